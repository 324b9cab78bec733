"""The callback under every strategy: what it does is what it does on one device."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_rejuv import PlasticityCallback, PlasticityMonitor, RejuvenationCallback, Reset
from lightning_rejuv.callbacks import WhenMetric
from tests.callbacks.strategies import STRATEGIES, Sharded
from tests.callbacks.test_distributed import in_two_ranks
from tests.conftest import sharpened, tiny_llama
from tests.sharding import whole

SHARDING = [name for name in STRATEGIES if name != "ddp"]


class WholeWeights(Callback):
    """The whole weights before the update of each step, by the steps done; listed after the callback under test."""

    def __init__(self):
        self.before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        names = whole(trainer.strategy.model)
        self.before[trainer.global_step] = {name.removeprefix("module."): w for name, w in names.items()}


def fit(module, directory, *callbacks, strategy="auto", devices=1, ckpt_path=None, **options):
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        default_root_dir=directory,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        **{
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama()
    return base, sharpened(base)


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((torch.tensor(one[name]) - torch.tensor(other[name])).abs().max()) for name in one)


@pytest.mark.parametrize(
    "moment", [pytest.param({"at_start": True}, marks=pytest.mark.slow), {"at_epoch": 1}]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_of_every_step_are_those_of_one_device(pair, tmp_path, strategy, moment):
    base, sft = pair

    def run(**options):
        callback = RejuvenationCallback(base, **moment, alpha=0.4, reset=Reset(fraction=0.1))
        weights = WholeWeights()
        fit(Sharded(copy.deepcopy(sft), base), tmp_path, callback, weights, **options)
        return weights.before, callback.report.neurons_reset, callback.report.drift_after

    expected, neurons, drift = run()
    found = in_two_ranks(lambda: run(strategy=STRATEGIES[strategy](), devices=2))
    assert [error for _, error in found.values()] == [None, None]
    for (weights, reset, drift_after), _ in found.values():
        assert reset == neurons > 0
        assert drift_after == pytest.approx(drift, rel=1e-4)
        assert weights.keys() == expected.keys()
        for step in expected:
            assert largest_difference(weights[step], expected[step]) < 1e-5, step
    assert (tmp_path / "rejuvenation.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 4, 6], ids=["before the edit", "at its edge", "after it"])
@pytest.mark.parametrize("strategy", SHARDING)
def test_a_resumed_run_makes_the_edit_once(pair, tmp_path, strategy, steps):
    base, sft = pair

    def callback():
        return RejuvenationCallback(base, at_epoch=1, alpha=0.4, reset=Reset(fraction=0.1))

    def module():
        made = Sharded(copy.deepcopy(sft), base)
        made._data = made._data[:1] * 4  # a plain loader begins its epoch again where a run is resumed in it
        return made

    def run():
        options = {"strategy": STRATEGIES[strategy](), "devices": 2}
        whole_run, resumed = WholeWeights(), WholeWeights()
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)
        fit(module(), tmp_path, callback(), whole_run, saver, **options)
        again = callback()
        options["strategy"] = STRATEGIES[strategy]()
        checkpoint = str(tmp_path / f"step={steps}.ckpt")
        fit(module(), tmp_path, again, resumed, ckpt_path=checkpoint, **options)
        return whole_run.before, resumed.before, again.report is not None

    found = in_two_ranks(run)
    assert [error for _, error in found.values()] == [None, None]
    for (uninterrupted, resumed, edited), _ in found.values():
        assert edited == (steps <= 4)
        assert list(resumed) == list(range(steps, 8))
        for step in resumed:
            assert resumed[step] == uninterrupted[step]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", SHARDING)
def test_other_precisions(pair, tmp_path, strategy, precision):
    base, sft = pair

    def run(**options):
        callback = RejuvenationCallback(base, at_epoch=1, alpha=0.4)
        weights = WholeWeights()
        module = Sharded(copy.deepcopy(sft), base)
        fit(module, tmp_path, callback, weights, precision=precision, **options)
        dtypes = sorted({str(p.dtype) for p in module.parameters()})
        return weights.before, callback.report.drift_before, callback.report.drift_after, dtypes

    expected, before, after, dtypes = run()
    found = in_two_ranks(lambda: run(strategy=STRATEGIES[strategy](), devices=2))
    assert [error for _, error in found.values()] == [None, None]
    for (weights, drift_before, drift_after, found_dtypes), _ in found.values():
        assert found_dtypes == dtypes == ["torch.bfloat16" if precision == "bf16-true" else "torch.float32"]
        # FSDP computes in bfloat16 throughout where autocast does so in matrix products alone.
        assert (drift_before, drift_after) == pytest.approx((before, after), rel=0.02)
        assert drift_after < 0.5 * drift_before
        assert largest_difference(weights[4], expected[4]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_callback_that_does_not_fire_changes_no_bit(pair, tmp_path, strategy):
    base, sft = pair

    def run(*callbacks):
        weights = WholeWeights()
        strategies = {
            "strategy": STRATEGIES[strategy](),
            "devices": 2,
            "max_epochs": 3,
            "limit_train_batches": 2,
        }
        fit(Sharded(copy.deepcopy(sft), base), tmp_path, *callbacks, weights, **strategies)
        return weights.before

    def both():
        waiting = RejuvenationCallback(
            base, when=WhenMetric("val_loss", threshold=-1.0), alpha="auto", reset=Reset(fraction=0.1)
        )
        return run() == run(waiting), waiting.report is None

    found = in_two_ranks(both)
    assert list(found.values()) == [((True, True), None)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_initial_weights_as_the_anchor_are_written_whole(pair, tmp_path, strategy):
    base, sft = pair

    def run():
        before = {name: p.tolist() for name, p in sft.named_parameters()}
        callback = RejuvenationCallback("init", at_epoch=1, alpha=0.4, reset=Reset(fraction=0.1))
        strategies = {"strategy": STRATEGIES[strategy](), "devices": 2}
        fit(Sharded(copy.deepcopy(sft), base), tmp_path, callback, **strategies)
        written = load_file(callback.report.anchor)
        return {
            name: tensor.tolist() for name, tensor in written.items()
        } == before, callback.report.neurons_reset

    for (same, neurons), error in in_two_ranks(run).values():
        assert error is None
        assert same
        assert neurons > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_monitors_drift_fires_it(pair, tmp_path, strategy):
    base, sft = pair

    def run(**options):
        # Under tensor parallelism a process sees a part of the activations.
        monitor = PlasticityMonitor(anchor=base, sites=None, rank_sites=None)
        plasticity = PlasticityCallback(monitor, every_n_steps=2, figure_every_n_steps=0)
        callback = RejuvenationCallback(
            base,
            when=WhenMetric("plasticity/relative_drift", threshold=0.01, mode="max"),
            alpha=0.4,
        )
        trainer = fit(Sharded(copy.deepcopy(sft), base), tmp_path, plasticity, callback, **options)
        logged = float(trainer.callback_metrics["plasticity/relative_drift"])
        return callback.rejuvenated_at, callback.report.drift_before, callback.report.drift_after, logged

    expected = run()
    for found, error in in_two_ranks(lambda: run(strategy=STRATEGIES[strategy](), devices=2)).values():
        assert error is None
        assert found[0] == expected[0]
        assert found[1:] == pytest.approx(expected[1:], rel=1e-3)
