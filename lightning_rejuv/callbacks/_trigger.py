"""What every trigger is: the moment at which a callback rejuvenates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer


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


def planned_steps(trainer: Trainer) -> float:
    """How many updates the fit will make at most; infinity where only the run itself will tell."""
    if not trainer.lightning_module.automatic_optimization:
        return math.inf  # several optimizers may step in a batch
    try:
        planned = float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # accumulate_grad_batches changes on the way
        return math.inf
    return planned if planned >= 0 else math.inf  # -1 for data of unknown length
