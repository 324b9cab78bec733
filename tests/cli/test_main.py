"""The command as a person types it: what it does, prints and writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from lightning_rejuv.cli.main import main
from tests.checkpoints.directories import edit_config, known_pair, pair, tensors


@pytest.fixture
def models(tmp_path):
    return pair(tmp_path, dtype=torch.float32)


def test_the_whole_way(tmp_path, capsys):
    base, sft, calibration = map(str, known_pair(tmp_path))
    out = str(tmp_path / "out")
    common = ["--base", base, "--sft", sft]
    assert main(["diagnose", *common, "--calibration", calibration]) == 0
    assert "alpha found " in capsys.readouterr().out
    assert main(["rejuvenate", *common, "--out", out, "--calibration", calibration]) == 0
    printed = capsys.readouterr()
    assert f"Rejuvenated model in {out}" in printed.out
    assert main(["verify", out]) == 0
    assert "whole and loadable" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "rejuvenation.json").read_text())
    assert (report["attribution"]["neurons_reset"], report["options"]["reset"]) == (0, None)


def test_a_reset_is_made_where_it_is_asked_for(tmp_path, capsys):
    base, sft, calibration = map(str, known_pair(tmp_path))
    command = ["rejuvenate", "--base", base, "--sft", sft, "--out", str(tmp_path / "out"), "--alpha", "0.4"]
    assert main([*command, "--calibration", calibration, "--reset-fraction", "0.02"]) == 0
    assert "neurons reset" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "rejuvenation.json").read_text())
    assert report["attribution"]["neurons_reset"] == round(0.02 * report["attribution"]["neurons"])


@pytest.mark.parametrize(
    ("text", "alpha"), [("0.25", 0.25), ("alpha.yaml", {"*embed*": 0.0, "*": 1.0}), ("1", 1.0), ("0", 0.0)]
)
def test_alpha_as_a_number_or_a_file(models, tmp_path, text, alpha):
    base, sft = models
    (tmp_path / "alpha.yaml").write_text('"*embed*": 0\n"*": 1.0\n')
    given = str(tmp_path / text) if text.endswith("yaml") else text
    arguments = [
        "rejuvenate",
        "--base",
        str(base),
        "--sft",
        str(sft),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert main([*arguments, "--reset-fraction", "0", "--alpha", given]) == 0
    ours, theirs, out = tensors(sft), tensors(base), tensors(tmp_path / "out")
    for name, tensor in out.items():
        share = alpha if isinstance(alpha, float) else alpha["*embed*"] if "embed" in name else alpha["*"]
        assert torch.equal(tensor, torch.lerp(ours[name], theirs[name], 1 - share)), name


def test_json_and_quiet(models, tmp_path, capsys):
    common = ["--base", str(models[0]), "--sft", str(models[1])]
    fuse = ["rejuvenate", *common, "--reset-fraction", "0", "--alpha", "0.5"]
    assert main(["diagnose", *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "unknown"
    assert main([*fuse, "--out", str(tmp_path / "a"), "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["alpha"] == 0.5
    rounded = ["--quiet", "--dtype", "bfloat16", "--rounding", "nearest"]
    assert main([*fuse, "--out", str(tmp_path / "b"), *rounded]) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
    assert main(["verify", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_progress_bar_where_there_is_a_terminal(models, tmp_path, capsys, monkeypatch):
    fuse = ["rejuvenate", "--base", str(models[0]), "--sft", str(models[1])]
    fuse += ["--reset-fraction", "0", "--alpha", "0.5"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*fuse, "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().err
    assert "fusing the weights:   0 % |" in shown
    assert " left" in shown
    assert main([*fuse, "--out", str(tmp_path / "b"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_every_phase_of_a_diagnosis_is_named(tmp_path, capsys, monkeypatch):
    base, sft, calibration = map(str, known_pair(tmp_path))
    known = ["diagnose", "--base", base, "--sft", sft, "--calibration", calibration]
    capsys.readouterr()
    assert main(known) == 0
    assert " left" not in capsys.readouterr().err  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(known) == 0
    shown = capsys.readouterr()
    bars = re.findall(r"([a-z ]+): +0 % \|", shown.err)
    assert list(dict.fromkeys(bars)) == [
        "reading the weights",
        "comparing with the base",
        "sampling responses",
        "searching for alpha",
    ]
    assert "loading the model …" in shown.err
    assert "models ran         on cpu in float32" in shown.out


@pytest.mark.parametrize("verbose", [[], ["--json"], ["--quiet"]])
def test_a_verifier_of_the_working_directory_that_prints_leaves_the_report_whole(
    verbose, tmp_path, capfd, monkeypatch
):
    base, sft, calibration = map(str, known_pair(tmp_path))
    name = f"chatty{len(verbose) and len(verbose[0])}"
    (tmp_path / f"{name}.py").write_text(
        "import subprocess\nprint('imported')\ntold = []\n"
        "def right(prompt, response):\n    print('checking', prompt)\n"
        "    told or told.append(subprocess.run(['echo', 'a program'], check=True))\n"
        "    return len(response) % 2 == 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    known = ["diagnose", "--base", base, "--sft", sft, "--calibration", calibration]
    capfd.readouterr()
    assert main([*known, "--verifier", f"{name}:right", *verbose]) == 0
    printed = capfd.readouterr()
    assert all(text in printed.err for text in ("imported", "checking w2 w3", "a program"))
    assert "checking" not in printed.out
    if verbose == ["--json"]:
        assert json.loads(printed.out)["behaviour"]["rollouts"]["unfinished"] >= 0
    else:
        assert printed.out.startswith("" if verbose else f"{sft} beside {base}: ")


# A flag, what it is given, and what it is given beside.
_FUSION = ("--alpha", "0.5", "--reset-fraction", "0")
_IDLE = {
    "fusion alone": [("--calibration", "c.jsonl"), ("--compute-dtype", "bfloat16"), ("--seed", "1")],
    "diagnose": [
        ("--device", "cpu"),
        ("--compute-dtype", "float32"),
        ("--compute-dtype", "auto"),
        ("--verifier", "a:b"),
    ],
}


@pytest.mark.parametrize(("route", "flag"), [(route, flag) for route in _IDLE for flag in _IDLE[route]])
def test_a_flag_without_an_effect_is_refused_by_name(route, flag, models, tmp_path, capsys):
    common = ["--base", str(models[0]), "--sft", str(models[1])]
    fuse = ["rejuvenate", *common, *_FUSION, "--out", str(tmp_path / "out")]
    assert main([*(["diagnose", *common] if route == "diagnose" else fuse), *flag]) == 3
    name = "calibration" if flag[0] == "--verifier" else flag[0].removeprefix("--")
    assert name.replace("-", "_") in capsys.readouterr().err.replace("-", "_")
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys):
    for arguments, words in (
        (["--help"], ("alpha * SFT model", "exit codes", "typical use")),
        (
            ["rejuvenate", "--help"],
            ("LoRA", "--calibration", "must not exist", "(the default) is 0.4, unless"),
        ),
        (
            ["diagnose", "--help"],
            (
                "Without calibration data only files are read",
                "MODULE:FUNCTION",
                "a plain line's to the letter",
            ),
        ),
        (["verify", "--help"], ("Exit code 1",)),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words), text


def test_an_adapter_in_and_out_and_merged(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    from tests.checkpoints.test_adapter import write_adapter

    base, adapter = map(str, write_adapter(tmp_path, "lora"))
    out = str(tmp_path / "out")
    fuse = ["rejuvenate", "--sft", adapter, "--quiet"]
    for more, named in ((["--alpha", "auto"], "--alpha auto"), (["--reset-fraction", "0.02"], "--reset")):
        assert main([*fuse, "--out", out, *more]) == 3
        assert f"Expected no `{named}`" in capsys.readouterr().err
    assert main([*fuse, "--out", out]) == 0  # alpha is 0.4 where nothing is said
    half = [*fuse, "--reset-fraction", "0", "--alpha", "0.5"]
    assert main([*half, "--out", str(tmp_path / "half")]) == 0
    update, whole = tensors(tmp_path / "out"), tensors(tmp_path / "adapter")
    for name, tensor in whole.items():
        share = 0.4 if "lora_B" in name else 1.0
        torch.testing.assert_close(update[name], share * tensor, msg=name)
        torch.testing.assert_close(
            tensors(tmp_path / "half")[name], (0.5 if share < 1 else 1) * tensor, msg=name
        )
    assert json.loads((tmp_path / "out" / "rejuvenation.json").read_text())["alpha"] == 0.4
    assert main([*fuse, "--out", str(tmp_path / "x"), "--merge"]) == 3
    assert main([*fuse, "--out", str(tmp_path / "m"), "--merge", "--base", base]) == 0
    assert json.loads((tmp_path / "m" / "rejuvenation.json").read_text())["alpha"] == 0.4
    assert main(["verify", str(tmp_path / "m"), "--quiet"]) == 0
    capsys.readouterr()
    models_only = [("--calibration", "c.jsonl"), ("--device", "cpu"), ("--compute-dtype", "float32")]
    merged_only = [("--dtype", "float32"), ("--rounding", "nearest"), ("--seed", "1")]
    merge = ["--merge", "--base", base]
    for route, flags in (([], models_only + merged_only), (merge, models_only)):
        for flag in flags:
            assert main([*fuse, *route, "--out", str(tmp_path / "x"), *flag]) == 3
            assert f"Expected no `{flag[0]}`" in capsys.readouterr().err
    for more in (["--dtype", "float32"], ["--dtype", "bfloat16", "--rounding", "nearest"]):
        assert main([*fuse, *merge, "--out", str(tmp_path / "x"), "--seed", "1", *more]) == 3
        assert "Expected no `--seed` with `--rounding " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    rounded = ["--dtype", "bfloat16", "--seed"]
    for seed in ("1", "2"):
        assert main([*fuse, *merge, "--out", str(tmp_path / seed), *rounded, seed]) == 0
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    assert not all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_as_a_process(models, tmp_path):
    command = [sys.executable, "-m", "lightning_rejuv.cli.main", "verify", str(models[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "whole and loadable" in done.stdout
    assert done.stderr == ""


def test_without_transformers_what_needs_it_says_how_to_install_it(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    common = ["--base", str(models[0]), "--sft", str(models[1])]
    (tmp_path / "c.jsonl").write_text('{"prompt": "w1", "response": "w2"}')
    install = "needs transformers, which is not installed. Run `pip install lightning-rejuv[hf]`."
    assert main(["verify", str(models[1])]) == 0
    assert f"not checked: The architecture {install}" in capsys.readouterr().out
    fuse = ["rejuvenate", *common, *_FUSION, "--quiet", "--out", str(tmp_path / "fused")]
    assert main(fuse) == 0  # fusion reads and writes files
    calibrated = ["--calibration", str(tmp_path / "c.jsonl")]
    for command in (["rejuvenate", *common, "--out", str(tmp_path / "out")], ["diagnose", *common]):
        assert main([*command, *calibrated]) == 3
        assert install in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "hostile", ["\x1b[2J\x1b[31mok\x07", "a\u202eb\x9b2J", "a" * 1_000_000], ids=["escape", "c1", "long"]
)
def test_what_a_file_says_cannot_steer_the_terminal_or_flood_it(models, tmp_path, capsys, hostile):
    base, sft = models
    both = ["--base", str(base), "--sft", str(sft)]
    (sft / "generation_config.json").write_text(json.dumps({"eos_token_id": hostile}))
    edit_config(sft, rope_theta=hostile, dtype=hostile)
    assert main(["verify", str(sft)]) == 1
    assert main(["diagnose", *both]) == 0
    fusion = ["rejuvenate", *both, "--alpha", "0.4", "--reset-fraction", "0", "--out", str(tmp_path / "out")]
    assert main(fusion) == 0
    edit_config(sft, model_type=hostile)
    assert main(["diagnose", *both]) == 3
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (printed.out, printed.err, card):
        assert max(map(len, text.split("\n"))) < 5000
        assert all(c.isprintable() or c == "\n" for c in text)
