"""Ctrl-C at any moment of writing: no call hangs, and under the output's name stands the whole, or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import random
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.output import new_directory, write_file
from lightning_rejuv.checkpoints.writer import FileWriter, Hasher
from tests.checkpoints.directories import pair, tensors

_THREADS = ("lightning-rejuv-writer", "lightning-rejuv-hasher")
_FILES = (threading.__file__, queue.__file__, sys.modules[FileWriter.__module__].__file__)


def wait_for_the_threads(seconds=10.0):
    deadline = time.monotonic() + seconds
    while any(thread.name in _THREADS for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread of the library still waits"
        time.sleep(0.001)


class Interrupt:
    """Raises KeyboardInterrupt before some line of Python code that a call runs through."""

    def __init__(self, at, again=10**9):
        self.at, self.again, self.lines = at, at + again, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in _FILES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines in (self.at, self.again):
                sys.settrace(self)  # an exception of a tracer ends the tracing
                raise KeyboardInterrupt
        return self


def write_interrupted(folder, interrupt):
    """Write two files in a thread, interrupted; return whether the interrupt came."""
    came = []

    def body():
        try:
            with new_directory(folder / "out") as partial, FileWriter(partial) as writer:
                sys.settrace(interrupt)
                for file in ("a", "b"):
                    for _ in range(7):  # more than the queue holds
                        writer.write(file, torch.ones(500))
        except KeyboardInterrupt:
            came.append(True)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), f"hangs after an interrupt at line {interrupt.at}"
    return bool(came)


@pytest.mark.parametrize("again", [10**9, 1, 4], ids=["once", "at once again", "again while cleaning up"])
def test_an_interrupt_before_any_line_of_writing_neither_hangs_nor_leaves_anything(tmp_path, again):
    at = 0
    while True:
        at += 1
        interrupt = Interrupt(at, again)
        came = write_interrupted(tmp_path, interrupt)
        if not came:
            break
        assert not (tmp_path / "out").exists()
        wait_for_the_threads()
        if again > 10**6:
            assert os.listdir(tmp_path) == []
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
    assert at > 30
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "b"]


@pytest.mark.parametrize("call", ["os.write", "os.open", "os.fsync"])
def test_an_error_of_the_thread_never_leaves_a_call_waiting(tmp_path, monkeypatch, call):
    """At the last sync, too: an error there comes after everything was put."""
    fails = {"os.write": 3, "os.open": 2, "os.fsync": 1}[call]
    real, seen = getattr(os, call[3:]), []

    def failing(*arguments, **options):
        if threading.current_thread().name == _THREADS[0]:
            seen.append(1)
            if len(seen) >= fails:
                raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call[3:], failing)
    outcome = []

    def body():
        try:
            with FileWriter(tmp_path) as writer:
                for _ in range(20):
                    writer.write("a", torch.ones(10))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert "No space" in str(outcome[0])


def test_the_hasher_stops_with_an_error(tmp_path, monkeypatch):
    (tmp_path / "w").write_bytes(b"x")
    reads = []

    def endless(path, stopped):
        while not stopped():
            reads.append(time.sleep(0.001))
        return ""

    monkeypatch.setattr("lightning_rejuv.checkpoints.writer.hash_file", endless)
    with pytest.raises(KeyboardInterrupt), Hasher(tmp_path, {"base": (tmp_path, ["w", "w", "w"])}):
        while not reads:
            time.sleep(0.001)
        raise KeyboardInterrupt
    wait_for_the_threads()


def test_the_hasher_names_what_tells_a_checkpoint_from_another_and_the_weights(tmp_path):
    names = {
        *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    for name in {*names, "README.md", "model-00003-of-00002.safetensors"}:
        (tmp_path / name).write_text(f"the content of {name}")
    weights = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    with Hasher(tmp_path, {"sft": (tmp_path, weights)}) as hasher:
        found = hasher.report()
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    assert found == {"sft": {"path": str(tmp_path), "sha256": digests}}


def forked(base, sft, out):
    """Rejuvenate in a process of its own; it exits with 0 where it is done, with 130 where it is interrupted."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child

    def work():
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            rejuvenate_checkpoint(base, sft, out, alpha=0.5)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return 0
        except KeyboardInterrupt:
            return 130

    return exit_with(work)


def exit_with(work, levels=6):
    """End the process with what ``work`` returns; each level bears an interrupt, so that no second pytest goes on."""
    try:
        if levels:
            exit_with(work, levels - 1)
        os._exit(work())
    finally:
        os._exit(1)


def exit_code(child, seconds=60.0):
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("it hangs")
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 3], ids=["once", "three times"])
def test_interrupts_at_random_moments(tmp_path, times):
    base, sft = pair(tmp_path, hidden_size=256, num_hidden_layers=8, vocab_size=8000)
    out, draw = tmp_path / "out", random.Random(times)
    began = time.perf_counter()
    assert exit_code(forked(base, sft, out)) == 0
    whole = time.perf_counter() - began
    shutil.rmtree(out)
    codes = []
    for _ in range(100):
        child = forked(base, sft, out)
        time.sleep(draw.uniform(0, 0.8 * whole))
        for _ in range(times):
            os.kill(child, signal.SIGINT)  # not waited for: it exists until then
            time.sleep(draw.uniform(0, 0.005))
        codes.append(exit_code(child))
        assert out.exists() or codes[-1] != 0
        if out.exists():  # also where the interrupt came between the renaming and the return
            assert verify(out)
            shutil.rmtree(out)
    assert codes.count(130) > 30
    if times == 1:
        assert set(codes) <= {0, 130}


def test_the_writer_follows_nothing(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("years")
    with new_directory(tmp_path / "out") as partial:
        (partial / "model.safetensors").symlink_to(victim)
        (partial / "config.json").symlink_to(tmp_path / "new")
        with pytest.raises(FileExistsError), FileWriter(partial) as writer:
            writer.write("model.safetensors", b"weights")
        with pytest.raises(FileExistsError):
            write_file(partial / "config.json", b"{}")
    assert victim.read_text() == "years"
    assert not (tmp_path / "new").exists()


def test_the_writer_keeps_to_its_directory_when_a_link_takes_its_name(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "ours").mkdir()
    with FileWriter(tmp_path / "ours") as writer:
        writer.write("a", b"one")
        while not (tmp_path / "ours" / "a").exists():
            time.sleep(0.001)
        (tmp_path / "ours").rename(tmp_path / "aside")
        (tmp_path / "ours").symlink_to("victim")
        writer.write("b", b"two")
    assert os.listdir(tmp_path / "victim") == []
    assert sorted(os.listdir(tmp_path / "aside")) == ["a", "b"]


@pytest.mark.parametrize("call", range(0, 14, 2))
def test_a_full_disk_at_any_write(tmp_path, monkeypatch, call):
    base, sft = pair(tmp_path)
    write, calls = os.write, iter(range(10**6))

    def full(descriptor, data):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr("lightning_rejuv.checkpoints.writer.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", alpha=0.5)
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]


def test_a_write_that_takes_only_a_part_is_continued(tmp_path, monkeypatch):
    base, sft = pair(tmp_path)
    rejuvenate_checkpoint(base, sft, tmp_path / "whole", alpha=0.5)
    write = os.write
    monkeypatch.setattr("lightning_rejuv.checkpoints.writer.os.write", lambda d, data: write(d, data[:1000]))
    rejuvenate_checkpoint(base, sft, tmp_path / "parts", alpha=0.5)
    assert all(torch.equal(t, tensors(tmp_path / "whole")[n]) for n, t in tensors(tmp_path / "parts").items())
    assert verify(tmp_path / "parts")
