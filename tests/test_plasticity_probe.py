from __future__ import annotations

import copy
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rejuv.plasticity_probe import plasticity_probe


class Regression(LightningModule):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        with torch.no_grad():
            self.net[0].weight.mul_(scale)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("logged", -loss)
        return {"loss": loss, "returned": loss.detach() * 2}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Data(LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)


def everything(module):
    return [v.clone() for v in module.state_dict().values()]


def test_nothing_is_touched():
    module = Regression()
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    module.net[0].eval()
    weights, modes = everything(module), [m.training for m in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    data = Data()
    first = plasticity_probe(module, data, 12)
    assert all(torch.equal(a, b) for a, b in zip(weights, everything(module), strict=True))
    assert modes == [m.training for m in module.modules()]
    assert torch.equal(module.net[0].weight.grad, torch.ones_like(module.net[0].weight))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1], states[2]) == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert data.trainer is None
    torch.randn(3)
    assert plasticity_probe(module, data, 12) == first
    assert plasticity_probe(module, data, 12, seed=1) != first


def test_the_curve_is_that_of_a_plain_loop():
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    batches = [(x[i : i + 8], x[i : i + 8].sum(1, keepdim=True)) for i in (0, 8)]
    module = Regression()
    module.net[2].p = 0.0
    curve = plasticity_probe(module, DataLoader(batches, batch_size=None), 5)
    twin = copy.deepcopy(module)
    optimizer = twin.configure_optimizers()
    losses = []
    for step in range(5):  # the loader starts again after two batches
        inputs, target = batches[step % 2]
        loss = (twin.net(inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert list(curve.values) == pytest.approx(losses, rel=1e-6)
    trapezoids = [(a + b) / 2 for a, b in pairwise(losses)]
    assert curve.auc == pytest.approx(sum(trapezoids) / 4)
    assert curve.end == pytest.approx(losses[-1])


def test_a_saturated_network_learns_worse():
    plastic, rigid = Regression(), Regression(scale=100.0)
    data = Data()
    assert plasticity_probe(plastic, data, 60).auc < plasticity_probe(rigid, data, 60).auc


@pytest.mark.parametrize(("watch", "factor"), [("returned", 2), ("logged", -1)])
def test_other_values_can_be_watched(watch, factor):
    loss = plasticity_probe(Regression(), Data(), 4)
    other = plasticity_probe(Regression(), Data(), 4, watch=watch)
    assert list(other.values) == pytest.approx([factor * v for v in loss.values])


def test_in_the_middle_of_a_fit():
    class Probing(Callback):
        curve = None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                self.curve = plasticity_probe(pl_module, Data(), 4)

    def fit(callbacks):
        module = Regression()
        torch.manual_seed(3)
        Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        ).fit(module, datamodule=Data())
        return module

    probing = Probing()
    plain, probed = fit([]), fit([probing])
    assert len(probing.curve.values) == 4
    assert all(torch.equal(a, b) for a, b in zip(everything(plain), everything(probed), strict=True))


def test_bad_input():
    module = Regression()
    with pytest.raises(ValueError, match="`max_steps` to be an integer >= 1 but got 0"):
        plasticity_probe(Regression(), Data(), 0)
    with pytest.raises(ValueError, match=r"`watch='reward'` among .*\['loss', 'returned'\].*\['logged'\]"):
        plasticity_probe(Regression(), Data(), 2, watch="reward")
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="reward"):
        plasticity_probe(module, Data(), 2, watch="reward")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("steps", "last"), [(9, 1), (10, 1), (12, 2), (20, 2), (21, 3)])
def test_the_end_is_the_mean_of_the_last_tenth_of_the_steps_rounded_up(steps, last):
    curve = plasticity_probe(Regression(), Data(), steps)
    assert curve.end == pytest.approx(sum(curve.values[steps - last :]) / last)
