"""DDP on two processes: the same edit on both, that of a single process."""

from __future__ import annotations

import copy
import faulthandler
import multiprocessing
import os
import queue
import socket
import sys
import traceback

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_rejuv import RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.report.report import RejuvenationReport
from tests.callbacks.modules import Line, line_anchor
from tests.callbacks.test_rejuvenation import Calibrated, Snapshots
from tests.conftest import sharpened, tiny_llama


def _rank(function, rank, port, results):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(80, file=sys.__stderr__)  # where it waits, if it does
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    try:
        results.put((rank, function(), None))
    except BaseException as error:
        results.put((rank, None, f"{error}\n{traceback.format_exc()}"))
    finally:
        faulthandler.cancel_dump_traceback_later()


def in_two_ranks(function):
    """Both ranks' (result, error) of a function that fits with two CPU devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(function, rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        found = {rank: (result, error) for rank, result, error in (results.get(timeout=90) for _ in ranks)}
    except queue.Empty as error:
        raise TimeoutError("the two ranks wait for each other: a collective is missing on one") from error
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    return found


def _fit_two(module, tmp_path, *callbacks):
    trainer = Trainer(
        strategy=DDPStrategy(),
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module)


def _numbers(state):
    return {name: tensor.tolist() for name, tensor in state.items()}


class RankDependent(Calibrated):
    """Calibration data that differ between the ranks: only rank zero's may count."""

    def calibration_dataloader(self):
        return self._data[self.global_rank : self.global_rank + 1]


def test_every_rank_makes_the_edit_of_rank_zero(tmp_path):
    base = tiny_llama()
    sft = sharpened(base)

    def fit():
        snapshots = Snapshots()
        callback = RejuvenationCallback(base, at_start=True, alpha=0.5, reset=Reset(fraction=0.1))
        module = RankDependent(copy.deepcopy(sft), base)
        _fit_two(module, tmp_path, callback, snapshots)
        return _numbers(snapshots.taken[0]), _numbers(snapshots.taken[-1]), callback.report.to_dict()

    found = in_two_ranks(fit)
    assert [error for _, error in found.values()] == [None, None]
    (first, last, report), (other_first, other_last, other_report) = found[0][0], found[1][0]
    assert first == other_first
    assert last == other_last
    assert report == other_report
    expected = copy.deepcopy(sft)
    data = Calibrated(expected, base)._data[:1]
    rejuvenate(expected, base, data, alpha=0.5, reset=Reset(fraction=0.1))
    assert first == _numbers(expected.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rejuvenation.json"]


def test_a_failure_on_rank_zero_ends_both_ranks(tmp_path):
    base = tiny_llama()
    sft = sharpened(base)

    class Broken(Calibrated):
        def sample_responses(self, model):
            raise OSError("no more disk")

    def fit():
        callback = RejuvenationCallback(base, at_start=True, alpha="auto")
        _fit_two(Broken(copy.deepcopy(sft), base), tmp_path, callback)

    found = in_two_ranks(fit)
    assert "no more disk" in found[0][1]
    assert "Planning failed on rank 0: no more disk" in found[1][1]


def test_rank_zero_alone_writes_the_report(tmp_path, monkeypatch):
    """Two processes that write one file meet at its temporary name."""
    saved = []
    save = RejuvenationReport.save
    monkeypatch.setattr(RejuvenationReport, "save", lambda *args: saved.append(1) or save(*args))

    def fit():
        callback = RejuvenationCallback(line_anchor(), at_start=True, alpha=0.5)
        _fit_two(Line(), tmp_path, callback)
        return len(saved)

    assert in_two_ranks(fit) == {0: (1, None), 1: (0, None)}
