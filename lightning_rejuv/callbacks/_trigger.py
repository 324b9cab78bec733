"""What every trigger is: the moment at which a callback rejuvenates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from inspect import signature
from numbers import Real
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden


class Trigger(ABC):
    """Decides by level, never by equality: a run that resumes past the moment still comes due.

    A trigger is asked before every optimizer step whether it is due. Once it has fired it is not asked
    again, unless it repeats. Every rank has to get the same answer.

    Attributes:
        repeats: whether it can fire more than once in a run.
        at_end: whether it fires after the last update of the fit, rather than before an update.
    """

    repeats: ClassVar[bool] = False
    at_end: ClassVar[bool] = False

    @abstractmethod
    def due(self, trainer: Trainer, epoch: int) -> bool:
        """Whether to rejuvenate before the next update.

        Args:
            trainer: the Trainer; ``trainer.global_step`` updates have been made.
            epoch: the epoch that this next update belongs to.
        """

    @abstractmethod
    def reason(self) -> str:
        """Why it fired, as the end of a sentence: "at epoch 3", "since loss 0.2 < 0.3"."""

    def check(self, trainer: Trainer, *, ends_fit: bool) -> None:  # noqa: B027 (most have nothing to check)
        """Refuse, at the start of the fit, what can never come due.

        Args:
            trainer: the Trainer.
            ends_fit: whether the fit ends with the rejuvenation, so that it may also come due at its end.

        Raises:
            MisconfigurationException: the fit ends before.
        """

    def observe(self, trainer: Trainer) -> None:  # noqa: B027
        """Look at the metrics; called where a validation or, without one, a training epoch has ended."""

    def observe_sanity_check(self, trainer: Trainer) -> None:  # noqa: B027
        """Learn which metrics there will be; called where the sanity check has run the validation."""

    def observe_step(self, trainer: Trainer) -> None:  # noqa: B027
        """Look at the metrics; called after every training batch."""

    def fired(self, trainer: Trainer) -> str:
        """Take note that it was done; return the reason."""
        return self.reason()

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a resume: numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up a state again."""


def check_count(name: str, value: int | None, least: int) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MisconfigurationException(
            f"Expected argument `{name}` to be a whole number of at least {least} but got {value!r}."
        )


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise MisconfigurationException(f"Expected argument `{name}` to be True or False but got {value!r}.")


def check_name(monitor: Any) -> None:
    """Refuse what is no name of a metric."""
    if not isinstance(monitor, str) or not monitor:
        raise MisconfigurationException(
            f"Expected argument `monitor` to be the name of a metric but got {monitor!r}."
        )


def check_threshold(threshold: Any) -> None:
    """Refuse what is no finite number."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not math.isfinite(threshold):
        raise MisconfigurationException(
            f"Expected argument `threshold` to be a finite number but got {threshold!r}."
        )


def reloads_data(trainer: Trainer) -> bool:
    """Whether epochs may differ in length, since the module is asked for its data again."""
    return bool(trainer.reload_dataloaders_every_n_epochs)  # type: ignore[attr-defined]


def planned_steps(trainer: Trainer) -> float:
    """How many updates the fit will make at most; infinity where only the run itself will tell.

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


def planned_looks(trainer: Trainer, *, ends_fit: bool) -> float:
    """How many validations or, without them, training epochs can be acted upon at most.

    One that comes after the last update can only where the fit ends with the rejuvenation. Then it may also be
    the one that Lightning adds where EarlyStopping, or the module, stops the fit.

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
    """How many batches the fit trains on at most."""
    module = trainer.lightning_module
    if "dataloader_iter" in signature(module.training_step).parameters:
        return math.inf  # takes as many as it likes
    by_epochs = _epochs(trainer) * _epoch_length(trainer)
    schedules = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    accumulated = max(
        [trainer.accumulate_grad_batches, *(n for c in schedules for n in c.scheduling.values())]
    )
    if (
        not module.automatic_optimization
        or is_overridden("on_train_batch_start", module)  # may leave batches out
        or (trainer.strategy.handles_gradient_accumulation and accumulated > 1)  # not at an epoch's end
    ):
        return by_epochs
    return min(by_epochs, planned_steps(trainer) * accumulated)


def _epochs(trainer: Trainer) -> float:
    return math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)


def _epoch_length(trainer: Trainer) -> float:
    return math.inf if reloads_data(trainer) else float(trainer.num_training_batches)


def _floor(number: float, divisor: float) -> float:
    return number if math.isinf(number) else number // divisor
