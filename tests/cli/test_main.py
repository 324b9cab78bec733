from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

import lightning_rejuv
from lightning_rejuv import checkpoints
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


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "nowhere"], 1, "NOT usable"),
        (
            ["rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{tmp}/o"],
            3,
            "Expected calibration data",
        ),
        (
            ["rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{tmp}/o", "--alpha", "half"],
            3,
            "`--alpha`",
        ),
        (
            ["rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{tmp}/o", "--alpha", "2"],
            3,
            "`--alpha`",
        ),
        (["rejuvenate", "--sft", "{sft}", "--out", "{tmp}/o"], 3, "Expected `--base`"),
        (
            ["rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{tmp}/o", "--merge"],
            3,
            "for `--merge`",
        ),
        (
            [
                "rejuvenate",
                "--base",
                "{tmp}/x",
                "--sft",
                "{sft}",
                "--out",
                "{tmp}/o",
                "--reset-fraction",
                "0",
                "--alpha",
                "0.5",
            ],
            4,
            "base",
        ),
        (
            ["rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{tmp}/o", "--reset-fraction", "0"],
            3,
            "a number for `--alpha`",
        ),
        (
            [
                *("rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{base}"),
                *("--reset-fraction", "0", "--alpha", "0.5"),
            ],
            4,
            "overwr",
        ),
        (
            ["rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{tmp}/o", "--alpha", "no.yaml"],
            4,
            "no.yaml",
        ),
        (["diagnose", "--base", "{sft}", "--sft", "{tmp}/x"], 4, "Nothing is downloaded"),
        (
            ["diagnose", "--base", "{base}", "--sft", "{sft}", "--verifier", "a:b"],
            3,
            "`--calibration` with `--verifier`",
        ),
    ],
)
def test_exit_codes_and_messages(models, tmp_path, capsys, arguments, code, message):
    filled = [a.format(base=models[0], sft=models[1], tmp=tmp_path) for a in arguments]
    assert main(filled) == code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "o").exists()


def test_a_full_disk_and_an_interrupt(models, tmp_path, capsys, monkeypatch):
    fuse = [
        "rejuvenate",
        "--base",
        str(models[0]),
        "--sft",
        str(models[1]),
        "--reset-fraction",
        "0",
        "--alpha",
        "0.5",
        "--quiet",
    ]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning_rejuv.checkpoints.writer.os.write", full)
    assert main([*fuse, "--out", str(tmp_path / "out")]) == 4
    assert "No space left" in capsys.readouterr().err

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_rejuv.checkpoints.stream.lerp_", interrupt)
    assert main([*fuse, "--out", str(tmp_path / "out")]) == 130
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]


def test_wrong_usage_is_exit_code_2_and_one_line(capsys):
    for arguments in (
        ["fuse"],
        ["rejuvenate"],
        ["verify"],
        ["rejuvenate", "--dtype", "int8"],
        ["verify", "--x"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "typical use" in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"lightning-rejuv {lightning_rejuv.__version__}\n"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
@pytest.mark.parametrize("command", ["rejuvenate", "diagnose"])
def test_a_device_that_is_not_there_is_wrong_usage_before_anything_is_read(device, command, capsys):
    out = ["--out", "nowhere/out"] if command == "rejuvenate" else []
    nothing = ["--base", "nowhere", "--sft", "nowhere", "--calibration", "nowhere.jsonl"]
    assert main([command, *nothing, *out, "--device", device]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("lightning-rejuv: error: Expected `--device` to be a device that torch can use")
    assert repr(device) in printed
    assert printed.count("\n") == 1


class _Panic(BaseException):
    """As an extension module's panic: no Exception."""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (IndexError("index out of range\nin self"), 3, "IndexError: index out of range in self"),
        (KeyError("x"), 3, "KeyError: 'x'"),
        (_Panic("rust"), 3, "_Panic: rust"),
        (AssertionError(), 3, "AssertionError:"),
        (SystemExit(0), 3, "SystemExit(0)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 3, "There is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "There is not enough memory"),
        (MemoryError(), 3, "There is not enough memory"),
        (RuntimeError("CUDA error: device-side assert\nCompile with\n"), 3, "RuntimeError: CUDA error"),
        (ImportError("needs x. Run `pip install x`."), 3, "error: needs x. Run `pip install x`."),
        (ValueError("Expected a b"), 3, "error: Expected a b"),
        (PermissionError(13, "Permission denied", "f"), 4, "Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_is_one_line_and_a_documented_exit_code(error, code, text, capsys, monkeypatch):
    def fail(*_):
        warnings.warn("a library's advice", stacklevel=1)
        raise error

    monkeypatch.setattr(checkpoints, "verify", fail)
    assert main(["verify", "x"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
    assert printed.err.count("\n") == 1
    assert ("--traceback" in printed.err) == (code == 3 and type(error) not in (ValueError, ImportError)) or (
        "memory" in text
    )
    assert main(["verify", "x", "--traceback"]) == code
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert text in printed.splitlines()[-1]


@pytest.mark.usefixtures("signals_arrive")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_even_where_a_library_swallows_it(number, models, tmp_path, capsys, monkeypatch):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    fuse = ["rejuvenate", "--base", str(models[0]), "--sft", str(models[1]), "--alpha", "0.5"]
    fuse += ["--reset-fraction", "0", "--quiet", "--out", str(tmp_path / "out")]

    def swallowing(*_):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(5)

    monkeypatch.setattr("lightning_rejuv.checkpoints.rejuvenate.check_room", swallowing)
    assert main(fuse) == 128 + number
    assert "interrupted: nothing is left under the output's name" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_an_interrupt_after_the_output_is_whole_does_not_say_that_nothing_is_left(
    models, tmp_path, capsys, monkeypatch
):
    def interrupted(_report):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_rejuv.checkpoints.report.CheckpointReport.__str__", interrupted)
    fuse = ["rejuvenate", "--base", str(models[0]), "--sft", str(models[1]), "--alpha", "0.5"]
    assert main([*fuse, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("lightning-rejuv: error: interrupted\n")
    assert (tmp_path / "out" / "rejuvenation.json").exists()


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
