"""Plasticity by its definition: how far a discarded copy gets in a fixed number of steps."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_rejuv.functional._checks import check_count


@dataclass(frozen=True)
class LearningCurve:
    """The values that a copy of a module reached, step by step.

    Attributes:
        values: the watched value after each optimizer step.
        auc: area under the curve over its length, by trapezoids: the mean value on the way.
        end: mean of the last tenth of the values.
    """

    values: tuple[float, ...]
    auc: float
    end: float


def plasticity_probe(
    module: LightningModule,
    datamodule: LightningDataModule | DataLoader[Any],
    max_steps: int,
    *,
    watch: str = "loss",
    seed: int = 0,
) -> LearningCurve:
    """Train a copy of a module for a fixed budget with a fresh optimizer, and throw it away.

    Every measure of the monitor is a proxy; this is the thing itself, on a small budget. Compare modules on
    the same data, budget and seed; lower is better for a loss, higher for a reward. The module, its
    gradients, its optimizer and trainer, and all random states are as they were afterwards.

    Args:
        module: the module; its ``training_step`` and ``configure_optimizers`` are used, without its callbacks.
        datamodule: the data to train on; they begin again if they end before the budget.
        max_steps: optimizer steps.
        watch: a key of what ``training_step`` returns or logs, by default its loss.
        seed: of the copy's training.

    Returns:
        The learning curve.

    Raises:
        ValueError: ``max_steps`` is not positive, or ``watch`` is neither returned nor logged.

    Example::
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> data = DataLoader(torch.ones(4, 32))
        >>> curve = plasticity_probe(BoringModel(), data, max_steps=3)
        >>> len(curve.values)
        3
    """
    check_count("max_steps", max_steps)
    loader: dict[str, Any] = {"train_dataloaders": datamodule}
    attached = None
    if isinstance(datamodule, LightningDataModule):
        loader = {"datamodule": datamodule}
        attached = datamodule.trainer
    watcher = _Watcher(watch)
    failure: BaseException | None = None
    with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            _train(_fresh_copy(module), watcher, max_steps, loader)
        except BaseException as error:  # isolate_rng restores nothing if its block raises
            failure = error
    if isinstance(datamodule, LightningDataModule):
        datamodule.trainer = attached
    if failure is not None:
        raise failure
    values = watcher.values
    steps = [(a + b) / 2 for a, b in pairwise(values)] or values
    tail = values[-math.ceil(len(values) / 10) :]
    return LearningCurve(tuple(values), sum(steps) / len(steps), sum(tail) / len(tail))


def _fresh_copy(module: LightningModule) -> LightningModule:
    twin = copy.deepcopy(module)
    twin.configure_callbacks = list  # type: ignore[method-assign]
    twin.zero_grad(set_to_none=True)
    return twin.train()


def _train(module: LightningModule, watcher: Callback, max_steps: int, loader: dict[str, Any]) -> None:
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator=module.device.type,
        devices=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watcher],
    )
    trainer.fit(module, **loader)


class _Watcher(Callback):
    """Collects one value for each optimizer step."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.values: list[float] = []
        self._steps = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        returned = outputs if isinstance(outputs, dict) else {"loss": outputs}
        value = returned.get(self.key, trainer.callback_metrics.get(self.key))
        if value is None:
            raise ValueError(
                f"Expected `watch={self.key!r}` among what `training_step` returns ({sorted(returned)}) or logs "
                f"({sorted(trainer.callback_metrics)}) but found it in neither."
            )
        self.values.append(float(value))
