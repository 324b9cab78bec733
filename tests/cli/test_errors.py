"""Exit codes of the command, and what is said of an error, an interrupt or a full disk: one line."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
import warnings

import pytest
import torch

import lightning_rejuv
from lightning_rejuv import checkpoints
from lightning_rejuv.cli.main import main
from tests.checkpoints.directories import pair


@pytest.fixture
def models(tmp_path):
    return pair(tmp_path, dtype=torch.float32)


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
