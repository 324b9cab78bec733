from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest

from examples.sft_to_rl.model import build_model
from examples.sft_to_rl.pretrain import Pretraining
from examples.sft_to_rl.tasks import Recipe, get_task


def quiet_trainer(epochs=1, logger=False, callbacks=()):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=logger,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture(scope="session")
def _half_trained():
    """Models after 60 steps: enough to hold a dialogue now and then, far from sure of anything."""
    models = {}

    def train(name):
        if name not in models:
            task = get_task(name)
            module = Pretraining(
                build_model(len(task.vocabulary), 901), task, Recipe((40, 20), 20, 0, 0, 0), seed=901
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quiet_trainer().fit(module)
            models[name] = module.model
        return copy.deepcopy(models[name])

    return train


@pytest.fixture
def half_trained(_half_trained):
    """Function from a task's name to a fresh copy of its half-trained model."""
    return _half_trained
