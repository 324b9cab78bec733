"""DeepSpeed ZeRO 1 to 3 on a CPU. An optional job: DeepSpeed builds an extension when it first runs.

DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed
DS_ACCELERATOR=cpu pytest -m slow tests/callbacks/test_deepspeed.py
"""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
from lightning.pytorch import Callback

from lightning_rejuv import RejuvenationCallback, Reset
from tests.callbacks.strategies import DEEPSPEED, Sharded
from tests.callbacks.test_distributed import in_two_ranks
from tests.callbacks.test_sharded_strategies import WholeWeights, fit, largest_difference
from tests.conftest import sharpened, tiny_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None or os.environ.get("DS_ACCELERATOR") != "cpu",
        reason="DeepSpeed is not installed, or DS_ACCELERATOR is not cpu",
    ),
]


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama()
    return base, sharpened(base)


@pytest.mark.parametrize(
    "moment", [{"at_start": True}, {"at_epoch": 1}], ids=["at the start", "in the middle"]
)
@pytest.mark.parametrize("reset", [None, Reset(fraction=0.1)], ids=["fusion", "reset"])
@pytest.mark.parametrize("stage", DEEPSPEED)
def test_weights_of_every_step_are_those_of_one_device(pair, tmp_path, stage, reset, moment):
    base, sft = pair

    def run(**options):
        callback = RejuvenationCallback(base, **moment, alpha=0.4, reset=reset)
        weights = WholeWeights()
        fit(Sharded(copy.deepcopy(sft), base), tmp_path, callback, weights, **options)
        return weights.before, callback.report.drift_after

    expected, drift = run()
    found = in_two_ranks(lambda: run(strategy=DEEPSPEED[stage](), devices=2))
    assert [error for _, error in found.values()] == [None, None]
    for (weights, drift_after), _ in found.values():
        assert drift_after == pytest.approx(drift, rel=1e-4)
        assert weights.keys() == expected.keys()
        for step in expected:
            assert largest_difference(weights[step], expected[step]) < 1e-5, step


@pytest.mark.parametrize("stage", DEEPSPEED)
def test_master_and_copy_in_bfloat16_are_both_edited(pair, tmp_path, stage):
    base, sft = pair

    def run(**options):
        callback = RejuvenationCallback(base, at_epoch=1, alpha=0.4)
        weights = WholeWeights()
        module = Sharded(copy.deepcopy(sft), base)
        fit(module, tmp_path, callback, weights, precision="bf16-mixed", **options)
        return weights.before, callback.report.drift_before, callback.report.drift_after

    expected, before, after = run()
    found = in_two_ranks(lambda: run(strategy=DEEPSPEED[stage](), devices=2))
    assert [error for _, error in found.values()] == [None, None]
    for (weights, drift_before, drift_after), _ in found.values():
        assert (drift_before, drift_after) == pytest.approx((before, after), rel=0.02)
        for step in (4, 5, 7):  # a master or a copy left behind would be a drift of half the whole
            assert largest_difference(weights[step], expected[step]) < 0.05, step
        copies = torch.tensor(weights[4]["model.lm_head.weight"])
        assert torch.equal(copies, copies.bfloat16().float())


class MicroSteps(Callback):
    """Where in the engine's window of accumulation the callback listed before it fired."""

    def __init__(self, callback):
        self.callback, self.found = callback, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.found is None and self.callback.report is not None:
            engine = trainer.strategy.model
            self.found = (
                trainer.current_epoch,
                batch_idx,
                engine.micro_steps % engine.gradient_accumulation_steps(),
            )


def test_the_edit_waits_for_gradients_accumulated_across_the_end_of_an_epoch(pair, tmp_path):
    base, sft = pair

    def run():
        callback = RejuvenationCallback(base, at_epoch=1, alpha=0.4)
        look = MicroSteps(callback)
        options = {"strategy": DEEPSPEED["deepspeed zero 2"](), "devices": 2}
        options |= {"accumulate_grad_batches": 2, "limit_train_batches": 3}
        fit(Sharded(copy.deepcopy(sft), base), tmp_path, callback, look, **options)
        return look.found

    assert list(in_two_ranks(run).values()) == [((1, 1, 0), None)] * 2


def test_a_state_that_cannot_be_dropped_is_refused_before_training(pair, tmp_path):
    base, sft = pair

    def run():
        callback = RejuvenationCallback(base, at_epoch=1, optimizer_state="reset", alpha=0.5)
        options = {"strategy": DEEPSPEED["deepspeed zero 1"](), "devices": 2}
        fit(Sharded(copy.deepcopy(sft), base), tmp_path, callback, **options)

    assert all('"momentum" or "keep" under DeepSpeed' in error for _, error in in_two_ranks(run).values())
