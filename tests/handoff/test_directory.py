from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from lightning_rejuv.handoff import rejuvenate_checkpoint, verify
from lightning_rejuv.handoff.directory import new_directory
from tests.handoff.checkpoints import pair, tensors


def test_it_appears_with_everything_in_it(tmp_path):
    with new_directory(tmp_path / "deep" / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "inner" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="in between"), new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise RuntimeError("in between")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".out.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    (tmp_path / ".out.partial" / "link").symlink_to(tmp_path)
    with new_directory(tmp_path / "out") as partial:
        assert os.listdir(partial) == []
        (partial / "file").write_text("x")
    assert os.listdir(tmp_path) == ["out"]


def test_two_runs_for_one_name_do_not_meet(tmp_path):
    with new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        with pytest.raises(BlockingIOError, match="Another process"), new_directory(tmp_path / "out"):
            pass
        assert (partial / "file").exists()


def test_an_empty_directory_may_take_the_output_but_nothing_else(tmp_path):
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "out" / "file").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for taken in ("out", "link", "file"):
        with pytest.raises(FileExistsError), new_directory(tmp_path / taken):
            pass


_RUN = """
import sys, torch
from lightning_rejuv.handoff import rejuvenate_checkpoint
print("ready", flush=True)
sys.stdin.readline()
rejuvenate_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], reset_fraction=0)
"""


def start(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    return process


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_or_everything(tmp_path):
    base, sft = pair(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=8, vocab_size=2000)
    out = tmp_path / "out"
    reference = tmp_path / "reference"
    began = time.perf_counter()
    assert start(base, sft, reference).wait() == 0
    whole = time.perf_counter() - began
    expected, left_partial = tensors(reference), 0
    draw = random.Random(0)
    for _ in range(12):
        process = start(base, sft, out)
        time.sleep(draw.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert verify(out), verify(out)
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        left_partial += (tmp_path / ".out.partial").exists()
    assert left_partial  # some were killed while they were writing
    rejuvenate_checkpoint(base, sft, out, reset_fraction=0)
    assert all(torch.equal(t, expected[name]) for name, t in tensors(out).items())
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "reference", "sft"]


@pytest.mark.parametrize("call", range(0, 14, 2))
def test_a_full_disk_at_any_write(tmp_path, monkeypatch, call):
    base, sft = pair(tmp_path)
    write, calls = os.write, iter(range(10**6))

    def full(descriptor, data):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr("lightning_rejuv.handoff.writer.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", reset_fraction=0)
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]


def test_a_write_that_takes_only_a_part_is_continued(tmp_path, monkeypatch):
    base, sft = pair(tmp_path)
    rejuvenate_checkpoint(base, sft, tmp_path / "whole", reset_fraction=0)
    write = os.write
    monkeypatch.setattr("lightning_rejuv.handoff.writer.os.write", lambda d, data: write(d, data[:1000]))
    rejuvenate_checkpoint(base, sft, tmp_path / "parts", reset_fraction=0)
    assert all(torch.equal(t, tensors(tmp_path / "whole")[n]) for n, t in tensors(tmp_path / "parts").items())
    assert verify(tmp_path / "parts")


@pytest.mark.parametrize("which", ["base", "sft"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.99])
def test_a_truncated_shard_is_refused(tmp_path, which, keep):
    pair(tmp_path)
    file = sorted((tmp_path / which).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(ValueError, match="truncated"):
        rejuvenate_checkpoint(tmp_path / "base", tmp_path / "sft", tmp_path / "out", reset_fraction=0)
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    base, sft = pair(tmp_path)
    monkeypatch.setattr("lightning_rejuv.handoff.checkpoint.os.preadv", lambda *_: 0)
    with pytest.raises(OSError, match="ended early"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", reset_fraction=0)
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]
