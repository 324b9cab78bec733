from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time

import pytest
import torch

from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.output import new_directory
from tests.checkpoints.directories import pair, tensors


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


def _link(place, victim):
    place.symlink_to(victim)


def _dangling(place, victim):
    place.symlink_to(victim / "nowhere")


def _link_to_a_link(place, victim):
    (place.parent / "other").symlink_to(victim)
    place.symlink_to("other")


def _file(place, victim):
    place.write_text("mine")


def _hard_link(place, victim):
    os.link(victim / "deep" / "thesis.tex", place)


def _pipe(place, victim):
    os.mkfifo(place)


@pytest.mark.parametrize("plant", [_link, _dangling, _link_to_a_link, _file, _hard_link, _pipe])
def test_what_is_no_directory_at_the_partial_name_is_neither_followed_nor_removed(tmp_path, plant):
    victim, place = tmp_path / "victim", tmp_path / ".out.partial"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep" / "thesis.tex").write_text("years")
    plant(place, victim)
    before = os.lstat(place)
    with (
        pytest.raises(FileExistsError, match="a link or a file. Nothing there is touched"),
        new_directory(tmp_path / "out"),
    ):
        pass
    assert os.lstat(place).st_ino == before.st_ino
    assert [str(p.relative_to(victim)) for p in sorted(victim.rglob("*"))] == ["deep", "deep/thesis.tex"]
    assert not (tmp_path / "out").exists()


def test_another_users_directory_at_the_partial_name_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "file").write_text("theirs")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(FileExistsError, match="another user's directory"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.partial" / "file").read_text() == "theirs"


@pytest.mark.parametrize("how", ["link", "directory"])
def test_a_partial_directory_that_is_replaced_meanwhile_is_not_what_appears(tmp_path, how):
    victim, partial = tmp_path / "victim", tmp_path / ".out.partial"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years")
    with pytest.raises(OSError, match="moved or replaced"), new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        partial.rename(tmp_path / "aside")
        partial.symlink_to(victim) if how == "link" else shutil.copytree(victim, partial)
    assert not (tmp_path / "out").exists()
    assert (victim / "thesis.tex").read_text() == "years"
    assert (partial / "thesis.tex").read_text() == "years"


def test_a_parent_that_is_a_link_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_directory(tmp_path / "link" / "out") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "real" / "out" / "file").read_text() == "x"


def forked(base, sft, out, die_at=None):
    """Start a rejuvenation in a process of its own, that kills itself at one of its system calls."""
    child = os.fork()
    if child:
        return child
    try:
        if die_at is not None:
            calls = itertools.count()
            for name in ("write", "fsync", "rename"):
                setattr(os, name, _deadly(getattr(os, name), calls, die_at))
        rejuvenate_checkpoint(base, sft, out, alpha=0.5)
    finally:
        os._exit(0)


def _deadly(call, calls, die_at):
    def run(*arguments):
        if next(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    return run


def check_nothing_or_everything(out, expected):
    """Return whether it is there; remove it again."""
    if not out.exists():
        return False
    assert verify(out), verify(out)
    assert all(torch.equal(t, expected[name]) for name, t in tensors(out).items())
    shutil.rmtree(out)
    return True


def test_a_kill_at_any_moment_leaves_nothing_or_everything(tmp_path):
    base, sft = pair(tmp_path, hidden_size=128, num_hidden_layers=6, vocab_size=2000)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    began = time.perf_counter()
    os.waitpid(forked(base, sft, out), 0)
    whole = time.perf_counter() - began
    expected = tensors(out)
    shutil.rmtree(out)
    draw = random.Random(0)
    halfway = 0
    for _ in range(15):
        child = forked(base, sft, out)
        time.sleep(draw.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        halfway += not check_nothing_or_everything(out, expected) and partial.exists()
    assert halfway  # some were killed while they were writing
    rejuvenate_checkpoint(base, sft, out, alpha=0.5)
    assert check_nothing_or_everything(out, expected)
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]


def test_a_kill_at_every_write_sync_and_rename(tmp_path):
    base, sft = pair(tmp_path)
    out = tmp_path / "out"
    rejuvenate_checkpoint(base, sft, out, alpha=0.5)
    expected = tensors(out)
    assert check_nothing_or_everything(out, expected)
    appeared = []
    for die_at in itertools.count(0, 3):
        _, status = os.waitpid(forked(base, sft, out, die_at), 0)
        appeared.append(check_nothing_or_everything(out, expected))
        if not os.WIFSIGNALED(status):
            break
    assert len(appeared) > 10
    assert appeared[-1]
    assert not any(appeared[:-2])
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]
