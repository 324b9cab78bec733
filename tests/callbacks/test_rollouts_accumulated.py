"""Rollouts of batches whose gradients are accumulated: they are logged with the step that they make."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.metrics import PlasticityMonitor
from tests.callbacks.test_plasticity import Module, fit, rows_of


class Own(Module):
    """The first of every four batches is right in one of its two prompts, all others in none."""

    def training_step(self, rows, batch_idx):
        right = float(batch_idx % 4 == 0)
        return {
            **super().training_step(rows, batch_idx),
            "rewards": torch.tensor([[right, right], [0.0, 0.0]]),
        }


@pytest.mark.parametrize(("accumulated", "interval", "windows"), [(4, 2, 2), (4, 1, 4), (1, 4, 4), (1, 8, 2)])
def test_a_window_holds_all_batches_of_its_steps(accumulated, interval, windows, tmp_path):
    logger, monitor = CSVLogger(tmp_path), PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    options = {"accumulate_grad_batches": accumulated, "log_every_n_steps": interval}
    fit([PlasticityCallback(monitor, 100)], Own(), logger, data=64, **options)
    # Of 16 batches, each of 2 prompts, every fourth has a right one.
    assert rows_of(logger, "plasticity/pass_at_1") == [
        (interval * number + interval - 1, 0.125) for number in range(windows)
    ]
