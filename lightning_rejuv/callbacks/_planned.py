"""How many updates a fit makes at most, how often a trigger looks at its metric, and which share of them is done."""

from __future__ import annotations

import math
from inspect import signature

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_rejuv._compat import callbacks_of


def reloads_data(trainer: Trainer) -> bool:
    """Tell whether epochs may differ in length, since the module is asked for its data again."""
    return bool(trainer.reload_dataloaders_every_n_epochs)  # type: ignore[attr-defined]


def planned_steps(trainer: Trainer) -> float:
    """Return how many updates the fit will make at most; infinity if only the run itself will tell.

    With manual optimization this is ``max_steps``, which counts the steps of every optimizer: before a batch fewer
    have been made, and the last batch may make more.
    """
    limit = float(trainer.max_steps) if trainer.max_steps >= 0 else math.inf
    if not trainer.lightning_module.automatic_optimization:
        return limit  # several optimizers may step in a batch
    if reloads_data(trainer):
        return limit  # the epochs that follow may be longer
    try:
        planned = float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # accumulate_grad_batches changes on the way
        return limit
    return planned if planned >= 0 else math.inf  # -1 for data of unknown length


def share_done(trainer: Trainer, steps: int) -> float:
    """Return which share of the planned updates has been made; NaN if nobody knows how many there will be.

    Args:
        trainer: the Trainer.
        steps: updates so far, as ``trainer.global_step`` counts them.
    """
    if any(len(set(scheduling.values())) > 1 for scheduling in _accumulation_schedules(trainer)):
        return math.nan  # Lightning plans as if gradients were accumulated as now until the end
    planned = planned_steps(trainer)
    return steps / planned if math.isfinite(planned) else math.nan


def planned_looks(trainer: Trainer, *, ends_fit: bool) -> float:
    """Return how many validations or, without them, training epochs can be acted upon at most.

    One that comes after the last update can be acted upon only if the fit ends with the rejuvenation. It may then also
    be the one that Lightning adds when EarlyStopping, or the module, stops the fit.

    Args:
        trainer: the Trainer, at the start of a fit.
        ends_fit: whether the fit ends with the rejuvenation.
    """
    epochs, length = _epochs(trainer), _epoch_length(trainer)
    batches = _planned_batches(trainer) - 1  # those that another one follows
    if not any(trainer.num_val_batches):
        return min(epochs - 1, _floor(batches, length if math.isfinite(length) else 1)) + ends_fit
    spacing = trainer.val_check_batch
    if not spacing:  # by the clock
        return math.inf
    if reloads_data(trainer) and isinstance(trainer.val_check_interval, float):
        spacing = math.inf if trainer.val_check_interval == 1.0 else 1  # counted anew in every epoch
    every = trainer.check_val_every_n_epoch or 1
    if math.isfinite(spacing) and (trainer.check_val_every_n_epoch is None or math.isinf(length)):
        looks = _floor(batches, spacing)
    elif math.isinf(length):  # at every epoch's end, wherever that is
        looks = min(_floor(batches, every), _floor(epochs - 1, every))
    elif math.isinf(batches):
        looks = batches
    else:
        spacing = min(spacing, length)
        full, rest = divmod(batches, length)
        looks = full // every * (length // spacing)
        if (full + 1) % every == 0:
            looks += rest // spacing
    return looks + (ends_fit and epochs >= every)


def _planned_batches(trainer: Trainer) -> float:
    """Return how many batches the fit trains on at most."""
    module = trainer.lightning_module
    if "dataloader_iter" in signature(module.training_step).parameters:
        return math.inf  # the step takes as many as it likes
    by_epochs = _epochs(trainer) * _epoch_length(trainer)
    schedules = _accumulation_schedules(trainer)
    accumulated = max([trainer.accumulate_grad_batches, *(n for s in schedules for n in s.values())])
    if (
        not module.automatic_optimization
        or is_overridden("on_train_batch_start", module)  # may leave batches out
        or (trainer.strategy.handles_gradient_accumulation and accumulated > 1)  # not at an epoch's end
    ):
        return by_epochs
    return min(by_epochs, planned_steps(trainer) * accumulated)


def _accumulation_schedules(trainer: Trainer) -> list[dict[int, int]]:
    """Return for each GradientAccumulationScheduler from which epoch on it accumulates how many batches."""
    return [c.scheduling for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)]


def _epochs(trainer: Trainer) -> float:
    return math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)


def _epoch_length(trainer: Trainer) -> float:
    return math.inf if reloads_data(trainer) else float(trainer.num_training_batches)


def _floor(number: float, divisor: float) -> float:
    return number if math.isinf(number) else number // divisor
