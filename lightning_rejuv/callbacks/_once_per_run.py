"""What a run's checkpoints have to know, so that its model is rejuvenated exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_rejuv.callbacks.triggers import Trigger


@dataclass
class RunRecord:
    """State of a run, as its checkpoints carry it.

    Attributes:
        armed: whether its model is still to be rejuvenated.
        done_at: for each time it was done, how many updates had been made.
        initial_weights: path and digest of the file with the run's initial weights, if they are the anchor.
        editing: whether weights are being edited at this moment.
    """

    armed: bool = True
    done_at: list[int] = field(default_factory=list)
    initial_weights: dict[str, str] | None = None
    editing: bool = False

    @contextmanager
    def edit(self) -> Iterator[None]:
        """Mark what is saved inside the block, by a signal handler or after an error, as half edited."""
        self.editing = True
        yield  # an error leaves the mark
        self.editing = False

    def state_dict(self, trigger: Trigger) -> dict[str, Any]:
        """Return plain numbers and strings, which ``torch.load(weights_only=True)`` can read."""
        return {
            "armed": self.armed,
            "done_at": list(self.done_at),
            "initial_weights": self.initial_weights,
            "editing": self.editing,
            "trigger": {"class": type(trigger).__name__, **trigger.state_dict()},
        }

    @classmethod
    def restore(cls, state: dict[str, Any], trigger: Trigger) -> RunRecord:
        """Take up a run again, its trigger as well.

        Args:
            state: what :meth:`state_dict` returned.
            trigger: the trigger of this fit; if the checkpoint's is of another class, its state is left as it is. One
                that repeats goes on even if the one before had done its work.

        Raises:
            RuntimeError: the checkpoint was written in the middle of an edit.
        """
        if state["editing"]:
            raise RuntimeError(
                "Expected a checkpoint from before or after a rejuvenation but this one was written in the middle of "
                "it, which failed or was interrupted. Resume from the checkpoint before it."
            )
        armed: bool = state["armed"]
        if state["trigger"]["class"] == type(trigger).__name__:
            trigger.load_state_dict(state["trigger"])
        else:
            before, now = state["trigger"]["class"], type(trigger).__name__
            armed = armed or trigger.repeats
            then = "which counts afresh" if armed else "which does nothing, since it was done"
            rank_zero_warn(
                f"The checkpoint comes from a run that was to be rejuvenated by {before}, and now it is {now}, {then}. "
                f"So far the run was rejuvenated after steps: {state['done_at']}."
            )
        return cls(armed, list(state["done_at"]), state["initial_weights"])


class _UnusedKey(str):
    """The key of a callback that no Trainer has set up yet.

    A new Trainer compares the keys of its callbacks, and its message would not say what to do about two that are
    equal.
    """

    owner: Callback

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        equal = str.__eq__(self, other)
        if equal and isinstance(other, _UnusedKey) and other.owner is not self.owner:
            kind = type(self.owner).__name__
            raise MisconfigurationException(
                f"Expected a `name` for each {kind} of a Trainer that has two or more, since checkpoints, files and "
                f'logs are told apart by it, but two have the same: pass `{kind}(…, name="early")`, for example.'
            )
        return equal


class OncePerRun(Callback):
    """Keeps the record of a run over its fits and checkpoints.

    Args:
        trigger: when something is to be done.
        name: tells callbacks of one class apart.
    """

    def __init__(self, trigger: Trigger, name: str | None) -> None:
        self._trigger = trigger
        self._name = name
        # Lightning asks for the key at every hook, to profile the hook.
        self._state_key = type(self).__qualname__ + ("" if name is None else f"-{name}")
        self._set_up = self._trained = self._begun = False
        self._fresh = deepcopy(trigger.state_dict())
        self._begin()

    def _begin(self) -> None:
        """Start a run in which nothing has been done yet."""
        self._run = RunRecord()
        self._unseen: Trainer | None = None
        self._trigger.load_state_dict(self._fresh)

    @property
    def rejuvenated_at(self) -> list[int]:
        """How many updates had been made, for each time it was done in this run."""
        return list(self._run.done_at)

    @property
    @override
    def state_key(self) -> str:
        """The class and the name, but nothing that is tuned between two runs."""
        if self._set_up:
            return self._state_key
        key = _UnusedKey(self._state_key)
        key.owner = self
        return key

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._set_up = True
        self._trained = self._begun = False  # whether this fit came to train, and to a batch
        # A second fit of the same Trainer goes on with its run.
        if stage == "fit" and not trainer.global_step:
            self._begin()

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.state_key not in checkpoint["callbacks"]:
            self._begin()  # the checkpoint is of a run without this callback

    @property
    def _at_end(self) -> bool:
        """Whether the model is rejuvenated after the last update of the fit."""
        return self._trigger.at_end

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run.armed and not self._trained:
            rank_zero_warn(
                "The fit had nothing left to train and ended without rejuvenating the model. Train for one batch, "
                "resume from a checkpoint before the last update, or use `lightning_rejuv.rejuvenate`."
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        interrupted = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if interrupted and self._begun and self._run.armed and self._at_end and not self._run.editing:
            rank_zero_warn(
                f"The fit was interrupted at step {trainer.global_step}, before the end at which the model was to be "
                "rejuvenated: it was not. Resume the last checkpoint, or use `lightning_rejuv.rejuvenate` on its model."
            )

    def _look(self) -> None:
        """Look at the metrics of an epoch that has ended: the module's own hook logs them after that of callbacks."""
        trainer, self._unseen = self._unseen, None
        if trainer is not None:
            self._trigger.observe(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._look()
        return self._run.state_dict(self._trigger)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begin()
        self._run = RunRecord.restore(state_dict, self._trigger)
