"""In every precision and with every trigger the callback does what the function does, and else nothing."""

from __future__ import annotations

import copy
import hashlib
import random
from contextlib import nullcontext

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from lightning_rejuv import RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.callbacks import AtEnd, AtEpoch, AtStart, AtStep, Every, WhenMetric
from tests.callbacks.modules import Calibrated, equal, fit
from tests.callbacks.test_distributed import in_two_ranks
from tests.conftest import greedy_batch, sharpened, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")

OPTIONS = {"alpha": 0.4, "reset": Reset(fraction=0.1)}
TRIGGERS = {
    "start": (AtStart(), [0]),
    "epoch": (AtEpoch(1), [4]),
    "step": (AtStep(2), [2]),
    "end": (AtEnd(), [8]),
    "every": (Every(steps=3), [3, 6]),
    "metric": (WhenMetric("loss", 1e9, every_n_steps=2), [2]),
}
# On a CPU Lightning takes "16-mixed" for "bf16-mixed", and says so.
PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]


class Policy(Calibrated):
    """Trained with dropout on shuffled batches; calibrated from a loader that draws a seed when it is read."""

    def __init__(self):
        base = tiny_llama()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(tiny_llama(attention_dropout=0.2), base)
        self.model.load_state_dict(sharpened(base).state_dict())
        self.model.train()
        self._batches = [greedy_batch(base, seed=seed) for seed in (8, 9)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3, eps=1e-4)  # 1e-8 is 0 in float16

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self._data, batch_size=None, shuffle=True)

    def calibration_dataloader(self):
        return torch.utils.data.DataLoader(self._batches, batch_size=None, shuffle=True)


class States(Callback):
    """The weights, the optimizer's and the random states at every update and at the end."""

    def __init__(self):
        self.weights, self.moments, self.random = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append(copy.deepcopy(pl_module.model.state_dict()))
        self.moments.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        legacy = numpy.random.get_state()[1].tolist()  # noqa: NPY002
        self.random.append((torch.get_rng_state().tolist(), random.getstate(), legacy))

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module, None, 0)


def run(trigger, tmp_path, **options):
    """States before and after a callback with this trigger; None is a run without."""
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)  # noqa: NPY002 (the global state is what data loaders draw from)
    before, after, module = States(), States(), Policy()
    callback = RejuvenationCallback(tiny_llama(), when=trigger, **OPTIONS) if trigger else Callback()
    trainer = fit(module, before, callback, after, tmp_path=tmp_path, max_epochs=2, **options)
    return before, callback, after, trainer


def _autocast(plugin):
    if not isinstance(plugin, MixedPrecision):
        return nullcontext()
    dtype = torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16
    return torch.autocast("cpu", dtype, cache_enabled=False)


def expected(weights, trainer, calibration):
    """The function on a copy, as training runs it."""
    dtype = next(iter(weights.values())).dtype
    model, base = tiny_llama(dtype=dtype, attention_dropout=0.2), tiny_llama()
    model.load_state_dict(weights)
    with _autocast(trainer.precision_plugin):
        rejuvenate(model, base, calibration, **OPTIONS)
    return model.state_dict()


def check(trigger, moments, tmp_path, **options):
    """Edits are the function's, where they should be; up to the first one nothing differs from a run without."""
    before, callback, after, trainer = run(trigger, tmp_path, **options)
    plain, *_ = run(None, tmp_path, **options)
    assert callback.rejuvenated_at == moments
    calibration = Policy()._batches
    steps = len(before.weights)
    assert steps == trainer.global_step + 1 > moments[-1]
    for step in range(steps):
        if step in moments:
            assert equal(after.weights[step], expected(before.weights[step], trainer, calibration))
            assert not equal(after.weights[step], before.weights[step])
        else:
            assert equal(after.weights[step], before.weights[step])
        assert before.random[step] == after.random[step] == plain.random[step]
    for step in range(moments[0] + 1):
        assert equal(before.weights[step], plain.weights[step])
        for number, moment in plain.moments[step].items():
            assert all(torch.equal(value, before.moments[step][number][key]) for key, value in moment.items())
    return after


MATRIX = [
    pytest.param(trigger, precision, marks=[] if quick else [pytest.mark.slow])
    for trigger in TRIGGERS
    for precision in PRECISIONS
    for quick in [
        precision == "32-true" or trigger == "step" or (trigger, precision) == ("end", "bf16-mixed")
    ]
]


@pytest.mark.parametrize(("trigger", "precision"), MATRIX)
def test_one_process(trigger, precision, tmp_path):
    check(*TRIGGERS[trigger], tmp_path, precision=precision)


@pytest.mark.parametrize("trigger", ["step", pytest.param("end", marks=pytest.mark.slow)])
def test_a_scaled_loss(trigger, tmp_path):
    """What "16-mixed" is on a GPU: float16 products and a gradient scaler."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**6))
    check(*TRIGGERS[trigger], tmp_path, plugins=[plugin])
    assert plugin.scaler.get_scale() == 2.0**6


RANKS = [pytest.param(t, marks=[] if t == "step" else [pytest.mark.slow]) for t in TRIGGERS]


@pytest.mark.parametrize("trigger", RANKS)
def test_two_ranks(trigger, tmp_path):
    def train():
        # Four batches an epoch on each rank, the same on both: the sampler is not exchanged.
        options = {
            "strategy": "ddp",
            "devices": 2,
            "use_distributed_sampler": False,
            "precision": "bf16-mixed",
        }
        after = check(*TRIGGERS[trigger], tmp_path, **options)
        content = b"".join(weight.numpy().tobytes() for state in after.weights for weight in state.values())
        return hashlib.sha256(content).hexdigest()

    found = in_two_ranks(train)
    assert [error for _, error in found.values()] == [None, None]
    assert found[0][0] == found[1][0]


def test_gradients_are_accumulated_as_without(tmp_path):
    """Due in the middle of an epoch of two updates, each over two batches."""
    before, callback, after, trainer = run(AtStep(1), tmp_path, accumulate_grad_batches=2)
    assert callback.rejuvenated_at == [1]
    changed = [
        i for i, (a, b) in enumerate(zip(before.weights, after.weights, strict=True)) if not equal(a, b)
    ]
    assert changed == [2]
    assert equal(after.weights[2], expected(before.weights[2], trainer, Policy()._batches))


def test_forward_passes_run_under_the_precision_plugin(tmp_path):
    """A reset that is chosen with float32 activations is not the one chosen with those of training."""
    seen = []

    class Watched(Policy):
        def sample_responses(self, model):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
            return self._batches

    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        callback = RejuvenationCallback(tiny_llama(), at_start=True, alpha="auto")
        fit(Watched(), callback, tmp_path=tmp_path, precision=precision, max_steps=1)
    assert seen == [(False, torch.float32), (True, torch.float32), (False, torch.float32)]
    assert torch.get_default_dtype() == torch.float32
