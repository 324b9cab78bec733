"""When to rejuvenate: small classes that a YAML file can name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_rejuv.names import listing


class Trigger(ABC):
    """Decides by level, never by equality: a run that resumes past the moment still comes due.

    A trigger is asked before every optimizer step whether it is due. Once it has fired it is not asked
    again, unless it repeats.
    """

    @abstractmethod
    def due(self, trainer: Trainer) -> bool:
        """Whether to rejuvenate before the step at hand."""

    def check(self, trainer: Trainer) -> None:  # noqa: B027 (most triggers have nothing to check)
        """Refuse, at the start of the fit, what can never come due.

        Raises:
            MisconfigurationException: the fit ends before.
        """

    def observe(self, trainer: Trainer) -> None:  # noqa: B027
        """Look at the metrics; called where a validation or a training epoch has ended."""

    def fired(self, trainer: Trainer) -> bool:
        """Take note that it was done; return whether the trigger is to be asked again."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a resume: numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up a state again."""


class AtStart(Trigger):
    """Before the first update of the fit: the RL stage that starts from an SFT model.

    >>> AtStart().due(Trainer(logger=False))
    True
    """

    @override
    def due(self, trainer: Trainer) -> bool:
        return True


class AtEpoch(Trigger):
    """Before the first update of an epoch.

    Args:
        epoch: which, counted from 0.
    """

    def __init__(self, epoch: int) -> None:
        _check_count("epoch", epoch, 0)
        self.epoch = epoch

    @override
    def due(self, trainer: Trainer) -> bool:
        return trainer.current_epoch >= self.epoch

    @override
    def check(self, trainer: Trainer) -> None:
        if trainer.max_epochs not in (None, -1) and self.epoch >= trainer.max_epochs:
            raise MisconfigurationException(
                f"Epoch {self.epoch} can never come: the fit ends before epoch {trainer.max_epochs}."
            )


class AtStep(Trigger):
    """Before the update that follows a number of optimizer steps.

    Args:
        step: how many ``trainer.global_step`` has to count.
    """

    def __init__(self, step: int) -> None:
        _check_count("step", step, 0)
        self.step = step

    @override
    def due(self, trainer: Trainer) -> bool:
        return trainer.global_step >= self.step

    @override
    def check(self, trainer: Trainer) -> None:
        if not trainer.lightning_module.automatic_optimization:
            return  # several optimizers may step in a batch: only the run itself will tell
        planned = trainer.estimated_stepping_batches
        if self.step >= planned:
            raise MisconfigurationException(
                f"Step {self.step} can never come: the fit ends after step {planned}."
            )


class Every(Trigger):
    """Again and again: continual use. Not before the first update.

    Args:
        epochs: rejuvenate every so many epochs, or
        steps: every so many optimizer steps.
    """

    def __init__(self, epochs: int | None = None, steps: int | None = None) -> None:
        if (epochs is None) == (steps is None):
            raise MisconfigurationException(
                f"Expected exactly one of `epochs` and `steps` but got epochs={epochs}, steps={steps}."
            )
        self._name = "epochs" if steps is None else "steps"
        self.interval = epochs if steps is None else steps
        _check_count(self._name, self.interval, 1)
        self._done = 0

    def _intervals(self, trainer: Trainer) -> int:
        assert self.interval is not None
        count = trainer.current_epoch if self._name == "epochs" else trainer.global_step
        return count // self.interval

    @override
    def due(self, trainer: Trainer) -> bool:
        return self._intervals(trainer) > self._done

    @override
    def fired(self, trainer: Trainer) -> bool:
        self._done = self._intervals(trainer)
        return True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = int(state["done"])


class WhenMetric(Trigger):
    """When a logged metric crosses a threshold, as in ``EarlyStopping``.

    Looked at where a validation or a training epoch has ended; any metric in ``trainer.callback_metrics``
    works, those of :class:`PlasticityCallback` among them.

    Args:
        monitor: the metric's name, for example "plasticity/token_entropy".
        threshold: what it has to cross.
        mode: "min" fires below the threshold, "max" above it.
        patience: how many looks in a row it has to be there.

    Raises:
        RuntimeError: at a look, no metric has that name; the message lists those there are.
    """

    def __init__(
        self, monitor: str, threshold: float, mode: Literal["min", "max"] = "min", patience: int = 1
    ) -> None:
        if mode not in ("min", "max"):
            raise MisconfigurationException(
                f'Expected argument `mode` to be "min" or "max" but got {mode!r}.'
            )
        if not math.isfinite(threshold):
            raise MisconfigurationException(
                f"Expected argument `threshold` to be finite but got {threshold}."
            )
        _check_count("patience", patience, 1)
        self.monitor = monitor
        self.threshold = threshold
        self.mode = mode
        self.patience = patience
        self._crossed = 0

    @override
    def observe(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise RuntimeError(
                f"Expected a metric {self.monitor!r} to decide when to rejuvenate but none has that name. Known: "
                f"{listing(metrics)}. Log it with `self.log`, or add the callback that does."
            )
        value = float(metrics[self.monitor])
        crossed = value < self.threshold if self.mode == "min" else value > self.threshold
        self._crossed = self._crossed + 1 if crossed else 0

    @override
    def due(self, trainer: Trainer) -> bool:
        return self._crossed >= self.patience

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"crossed": self._crossed}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._crossed = int(state["crossed"])


def _check_count(name: str, value: int | None, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MisconfigurationException(
            f"Expected argument `{name}` to be a whole number of at least {least} but got {value!r}."
        )
