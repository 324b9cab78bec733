"""The end of a fit whose parameters are sharded: hooks, checkpoints and the initial weights on disk."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import WhenMetric
from tests.callbacks.strategies import STRATEGIES, Sharded
from tests.callbacks.test_distributed import in_two_ranks
from tests.callbacks.test_sharded_strategies import fit, largest_difference
from tests.conftest import sharpened, tiny_llama
from tests.sharding import whole

MOMENTS = {
    "at the end": {"at_end": True},
    "stopped": {"when": WhenMetric("val_loss", 100.0), "stop_after": True},
}
MATRIX = [
    pytest.param(strategy, moment, marks=[] if strategy == "fsdp2" else [pytest.mark.slow])
    for strategy in STRATEGIES
    for moment in MOMENTS
]


class Final(Callback):
    """The whole weights at the end of the fit."""

    def on_train_end(self, trainer, pl_module):
        weights = whole(trainer.strategy.model)
        self.weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(("strategy", "moment"), MATRIX)
def test_it_ends_with_the_weights_of_one_device(strategy, moment, tmp_path):
    """Pulled back to the initial weights; what it leaves resumes without another edit."""
    base = tiny_llama()
    sft = sharpened(base)

    def run(directory, ckpt_path=None, **options):
        callback = RejuvenationCallback("init", **MOMENTS[moment], alpha=0.3)
        final, saver = Final(), ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_top_k=-1)
        module = Sharded(copy.deepcopy(sft), base)
        trainer = fit(module, directory, callback, final, saver, ckpt_path=ckpt_path, **options)
        return trainer.global_step, callback.rejuvenated_at, final.weights

    def both():
        sharded = {"devices": 2}
        ended = run(tmp_path / "sharded", strategy=STRATEGIES[strategy](), **sharded)
        path = str(tmp_path / "sharded" / "rejuvenated.ckpt")
        again = run(tmp_path / "again", path, strategy=STRATEGIES[strategy](), max_epochs=3, **sharded)
        return ended, again[:2]

    steps, done, expected = run(tmp_path / "one")
    found = in_two_ranks(both)
    assert [error for _, error in found.values()] == [None, None]
    for (ended, again), _ in found.values():
        assert ended[:2] == (steps, done)
        assert largest_difference(ended[2], expected) < 1e-5
        assert again == (12, done)
    (file,) = (tmp_path / "sharded").glob("initial-weights-*.safetensors")
    initial = load_file(file)
    assert initial.keys() == dict(sft.named_parameters()).keys()
    assert all(torch.equal(initial[name], weight) for name, weight in sft.named_parameters())
