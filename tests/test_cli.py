from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from lightning_rejuv.cli import main
from tests.handoff.checkpoints import known_pair, pair, tensors


@pytest.fixture
def models(tmp_path):
    return pair(tmp_path, dtype=torch.float32)


def test_the_whole_way(tmp_path, capsys):
    base, sft, calibration = map(str, known_pair(tmp_path))
    out = str(tmp_path / "out")
    common = ["--base", base, "--sft", sft]
    assert main(["diagnose", *common, "--calibration", calibration]) == 0
    assert "recommended alpha" in capsys.readouterr().out
    assert main(["rejuvenate", *common, "--out", out, "--calibration", calibration]) == 0
    printed = capsys.readouterr()
    assert f"Rejuvenated model in {out}" in printed.out
    assert main(["verify", out]) == 0
    assert "whole and loadable" in capsys.readouterr().out
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
    assert (
        main([*fuse, "--out", str(tmp_path / "b"), "--quiet", "--dtype", "bfloat16", "--stochastic-rounding"])
        == 0
    )
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
    assert main(["verify", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_progress_bar_where_there_is_a_terminal(models, tmp_path, capsys, monkeypatch):
    fuse = ["rejuvenate", "--base", str(models[0]), "--sft", str(models[1])]
    fuse += ["--reset-fraction", "0", "--alpha", "0.5"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*fuse, "--out", str(tmp_path / "a")]) == 0
    assert "%" in capsys.readouterr().err
    assert main([*fuse, "--out", str(tmp_path / "b"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


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
            "`alpha`",
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
            "a number for `alpha`",
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
            "`calibration` with `verifier`",
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

    monkeypatch.setattr("lightning_rejuv.handoff.writer.os.write", full)
    assert main([*fuse, "--out", str(tmp_path / "out")]) == 4
    assert "No space left" in capsys.readouterr().err

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_rejuv.handoff.stream.lerp_", interrupt)
    assert main([*fuse, "--out", str(tmp_path / "out")]) == 130
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments in ([], ["fuse"], ["rejuvenate"], ["verify"], ["rejuvenate", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    capsys.readouterr()


def test_help_teaches(capsys):
    for arguments, words in (
        (["--help"], ("alpha * SFT model", "exit codes", "typical use")),
        (
            ["rejuvenate", "--help"],
            ("LoRA", "--calibration", "must not exist", "(the default) finds the largest"),
        ),
        (["diagnose", "--help"], ("Without calibration data only files are read", "MODULE:FUNCTION")),
        (["verify", "--help"], ("Exit code 1",)),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words), text


def test_an_adapter_in_and_out_and_merged(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    from tests.handoff.test_adapter import write_adapter

    base, adapter = map(str, write_adapter(tmp_path, "lora"))
    out = str(tmp_path / "out")
    fuse = ["rejuvenate", "--sft", adapter, "--quiet"]
    assert main([*fuse, "--out", out]) == 3
    assert "the reset and `--alpha auto` need a whole model" in capsys.readouterr().err
    fuse += ["--reset-fraction", "0", "--alpha", "0.5"]
    assert main([*fuse, "--out", out]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert main([*fuse, "--out", str(tmp_path / "x"), "--dtype", "float32"]) == 3
    assert main([*fuse, "--out", str(tmp_path / "x"), "--merge"]) == 3
    assert main([*fuse, "--out", str(tmp_path / "m"), "--merge", "--base", base]) == 0
    assert main(["verify", str(tmp_path / "m"), "--quiet"]) == 0


@pytest.mark.slow
def test_as_a_process(models, tmp_path):
    command = [sys.executable, "-m", "lightning_rejuv.cli", "verify", str(models[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "whole and loadable" in done.stdout
    assert done.stderr == ""
