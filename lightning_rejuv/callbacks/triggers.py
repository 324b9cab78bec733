"""The moments at which a callback rejuvenates: small classes that a YAML file can name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_rejuv.callbacks._planned import planned_steps, reloads_data


class Trigger(ABC):
    """Decides by level, never by equality: a run that resumes past the moment still comes due.

    A trigger is asked before every training batch whether it is due. Once it has fired it is not asked
    again, unless it repeats. Every rank has to get the same answer.

    Attributes:
        repeats: whether it can fire more than once in a run.
        at_end: whether it fires after the last update of the fit, rather than before an update.
    """

    repeats: ClassVar[bool] = False
    at_end: ClassVar[bool] = False

    @abstractmethod
    def due(self, trainer: Trainer, epoch: int) -> bool:
        """Tell whether to rejuvenate before the next update.

        Args:
            trainer: the Trainer; ``trainer.global_step`` updates have been made.
            epoch: the epoch that this next update belongs to.
        """

    @abstractmethod
    def reason(self) -> str:
        """Return why it fired, as the end of a sentence: "at epoch 3", "since loss 0.2 < 0.3"."""

    def check(self, trainer: Trainer, *, ends_fit: bool) -> None:  # noqa: B027 (most have nothing to check)
        """Refuse, at the start of the fit, what can never come due.

        Args:
            trainer: the Trainer.
            ends_fit: whether the fit ends with the rejuvenation, so that it may also come due at its end.

        Raises:
            MisconfigurationException: the fit ends before.
        """

    def observe(self, trainer: Trainer) -> None:  # noqa: B027
        """Look at the metrics; called when a validation or, without one, a training epoch has ended."""

    def observe_sanity_check(self, trainer: Trainer) -> None:  # noqa: B027
        """Learn which metrics there will be; called when the sanity check has run the validation."""

    def observe_step(self, trainer: Trainer) -> None:  # noqa: B027
        """Look at the metrics; called after every training batch."""

    def fired(self, trainer: Trainer) -> str:
        """Take note that it was done; return the reason."""
        return self.reason()

    def state_dict(self) -> dict[str, Any]:
        """Return what has to survive a resume: numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up a state again."""


def expect(holds: bool, name: str, what: str, value: Any) -> None:
    """Raise a MisconfigurationException that says what an argument should be, unless it is that."""
    if not holds:
        raise MisconfigurationException(f"Expected argument `{name}` to be {what} but got {value!r}.")


def expect_count(name: str, value: Any, at_least: int) -> None:
    """Raise a MisconfigurationException unless an argument is a whole number of at least ``at_least``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    expect(whole and value >= at_least, name, f"a whole number of at least {at_least}", value)


class AtStart(Trigger):
    """Fires before the first update of the fit: in the RL stage that starts from an SFT model.

    >>> AtStart().due(Trainer(logger=False), epoch=0)
    True
    """

    @override
    def due(self, trainer: Trainer, epoch: int) -> bool:
        return True

    @override
    def reason(self) -> str:
        return "at the start of the fit"


class AtEnd(Trigger):
    """Fires after the last update of the fit: in the SFT stage that hands over to RL.

    The fit may end by ``max_epochs``, ``max_steps``, ``max_time`` or EarlyStopping; if it is interrupted or fails,
    the trigger does not fire. Checkpoints that were written before hold the weights before the edit, under the
    metrics of these; the edited weights are in the module and, if the Trainer has a ``ModelCheckpoint``,
    in ``rejuvenated.ckpt`` beside its files.
    """

    at_end: ClassVar[bool] = True

    @override
    def due(self, trainer: Trainer, epoch: int) -> bool:
        return True

    @override
    def reason(self) -> str:
        return "at the end of the fit"


class AtEpoch(Trigger):
    """Fires before the first update of an epoch.

    Args:
        epoch: which, counted from 0.
    """

    def __init__(self, epoch: int) -> None:
        expect_count("epoch", epoch, 0)
        self.epoch = epoch

    @override
    def due(self, trainer: Trainer, epoch: int) -> bool:
        return epoch >= self.epoch

    @override
    def reason(self) -> str:
        return f"at epoch {self.epoch}"

    @override
    def check(self, trainer: Trainer, *, ends_fit: bool) -> None:
        _check_epoch(trainer, self.epoch)


class AtStep(Trigger):
    """Fires before the update that follows a number of optimizer steps.

    Args:
        step: how many ``trainer.global_step`` has to count.
    """

    def __init__(self, step: int) -> None:
        expect_count("step", step, 0)
        self.step = step

    @override
    def due(self, trainer: Trainer, epoch: int) -> bool:
        return trainer.global_step >= self.step

    @override
    def reason(self) -> str:
        return f"at step {self.step}"

    @override
    def check(self, trainer: Trainer, *, ends_fit: bool) -> None:
        _check_step(trainer, self.step, ends_fit)


class Every(Trigger):
    """Fires again and again, for continual use, but not before the first update.

    Args:
        epochs: rejuvenate every so many epochs; give this or ``steps``.
        steps: rejuvenate every so many optimizer steps.
    """

    repeats: ClassVar[bool] = True

    def __init__(self, epochs: int | None = None, steps: int | None = None) -> None:
        if epochs is not None and steps is None:
            self._name, self.interval = "epochs", epochs
        elif steps is not None and epochs is None:
            self._name, self.interval = "steps", steps
        else:
            raise MisconfigurationException(
                f"Expected exactly one of `epochs` and `steps` but got epochs={epochs}, steps={steps}."
            )
        expect_count(self._name, self.interval, 1)
        self._done = 0

    def _intervals(self, trainer: Trainer, epoch: int) -> int:
        return (epoch if self._name == "epochs" else trainer.global_step) // self.interval

    @override
    def due(self, trainer: Trainer, epoch: int) -> bool:
        return self._intervals(trainer, epoch) > self._done

    @override
    def reason(self) -> str:
        return f"after every {self.interval} {self._name}"

    @override
    def check(self, trainer: Trainer, *, ends_fit: bool) -> None:
        if self._name == "epochs":
            _check_epoch(trainer, self.interval)
        else:
            _check_step(trainer, self.interval, ends_fit)

    @override
    def fired(self, trainer: Trainer) -> str:
        self._done = self._intervals(trainer, trainer.current_epoch)
        return self.reason()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = int(state["done"])


def one_trigger(at_start: bool, at_epoch: int | None, at_end: bool, when: Trigger | None) -> Trigger:
    """Turn the arguments that say when to rejuvenate into a trigger that no other callback shares.

    Raises:
        MisconfigurationException: not exactly one is given, or one is of another type.
    """
    expect(isinstance(at_start, bool), "at_start", "True or False", at_start)
    expect(isinstance(at_end, bool), "at_end", "True or False", at_end)
    if at_epoch is not None:
        expect_count("at_epoch", at_epoch, 0)
    if when is not None and not isinstance(when, Trigger):
        raise MisconfigurationException(
            f"Expected argument `when` to be a trigger, such as `AtStep(100)`, but got {_named(when)}."
        )
    if sum([at_start, at_epoch is not None, at_end, when is not None]) != 1:
        raise MisconfigurationException(
            "Expected exactly one of `at_start=True`, `at_epoch=<epoch>`, `at_end=True` and `when=<trigger>` but "
            f"got at_start={at_start}, at_epoch={at_epoch}, at_end={at_end}, when={when}: say when to rejuvenate."
        )
    if when is not None:
        return deepcopy(when)  # a trigger has a state
    return AtEpoch(at_epoch) if at_epoch is not None else AtStart() if at_start else AtEnd()


def _named(when: Any) -> str:
    if not isinstance(when, type):
        return f"{when!r}; for the start, an epoch or the end there are `at_start`, `at_epoch` and `at_end`"
    if issubclass(when, Trigger):
        return f"the class {when.__name__}; make one of it: `{when.__name__}(…)`"
    return f"the class {when.__name__}"


def _check_epoch(trainer: Trainer, epoch: int) -> None:
    last = trainer.max_epochs
    if last not in (None, -1) and epoch >= last:
        raise MisconfigurationException(
            f"Epoch {epoch} can never come: the fit ends before epoch {last}. Epochs are counted from 0; for the end "
            "of the fit there is `at_end=True`."
        )
    # How many steps an epoch has is not known if the module makes them, or if the data change.
    known = trainer.lightning_module.automatic_optimization and not reloads_data(trainer)
    if known and trainer.num_training_batches != math.inf:
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        if not trainer.strategy.handles_gradient_accumulation:
            steps = math.ceil(steps)  # Lightning steps on the last batch of an epoch
        planned = planned_steps(trainer)
        if epoch * steps >= planned:
            raise MisconfigurationException(
                f"Epoch {epoch} can never come: the fit ends after step {planned:.0f}, and an epoch has {steps:g}. For "
                "the end of the fit there is `at_end=True`."
            )


def _check_step(trainer: Trainer, step: int, ends_fit: bool) -> None:
    planned = planned_steps(trainer)
    if ends_fit and not trainer.lightning_module.automatic_optimization:
        return  # the last batch may make more steps than planned
    if step >= planned:
        raise MisconfigurationException(
            f"Step {step} can never come: the fit ends after step {planned:.0f}. For the end of the fit there is "
            "`at_end=True`."
        )
