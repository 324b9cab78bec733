"""LightningModules that the callback's tests train, and what they watch them with."""

from __future__ import annotations

import copy

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tests.conftest import greedy_batch


class Module(LightningModule):
    """A Hugging Face model, trained on its own greedy samples: four batches an epoch."""

    def __init__(self, model, base):
        super().__init__()
        self.model = model
        self._data = [greedy_batch(base, seed=seed) for seed in range(4)]

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self._data, batch_size=None)


class Calibrated(Module):
    def calibration_dataloader(self):
        return self._data[:2]

    def sample_responses(self, model):
        self.sampled_from = copy.deepcopy(model.state_dict())
        return self._data[2:]


class Line(LightningModule):
    """The quickest there is, with an optimizer that has a state: four batches an epoch.

    What a step does depends on the weights and the number of the batch alone, so that a resumed run is exact
    whatever the data loader does. In training it logs ``loss`` at every step and ``epoch_loss`` from its own
    hook at an epoch's end; validation logs ``level``: 0.9, 0.8, 0.7 after the epochs 0, 1, 2.
    """

    def __init__(self, validates=True, manual=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.validates = validates
        self.automatic_optimization = not manual
        self.manual = manual  # every so many batches an optimizer steps

    def loss(self):
        seen = self.trainer.fit_loop.total_batch_idx
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seen))
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss()
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if (self.trainer.fit_loop.total_batch_idx + 1) % self.manual == 0:
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
        return loss

    def on_train_epoch_end(self):
        self.log("epoch_loss", 1.0 - 0.1 * self.current_epoch)

    def validation_step(self, batch, batch_idx):
        self.log("level", 0.9 - 0.1 * self.current_epoch, on_epoch=True, batch_size=1)

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.Adam(self.parameters(), lr=0.02)
        return [torch.optim.SGD([p], lr=0.02) for p in self.parameters()][:2]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(4), batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([0], batch_size=None) if self.validates else []


def line_anchor(seed=6):
    """A base for `Line`, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in Line().model.named_parameters()}


class Snapshots(Callback):
    """The weights that each batch's update starts from; placed after the callback under test."""

    def __init__(self):
        self.taken = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.taken.append(copy.deepcopy(pl_module.model.state_dict()))


def fit(module, *callbacks, tmp_path, ckpt_path=None, **options):
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **{
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            **options,
        },
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def fused(state, anchor, alpha):
    """The fusion, anew."""
    return {name: torch.lerp(w, anchor[name], 1 - alpha) for name, w in state.items()}
