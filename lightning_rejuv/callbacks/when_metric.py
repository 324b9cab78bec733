"""Rejuvenating when a metric says so."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_rejuv.callbacks._plasticity_log import PREFIX
from lightning_rejuv.callbacks._trigger import Trigger, check_count, planned_steps
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.names import listing


class WhenMetric(Trigger):
    """When a logged metric crosses a threshold, as in ``EarlyStopping``.

    Looked at where a validation or, without one, a training epoch has ended, or else every n steps; what is
    seen is acted upon before the next update. Any metric in ``trainer.callback_metrics`` works, those of
    :class:`PlasticityCallback` among them. Where ranks see different values, one that crosses is enough.

    Args:
        monitor: the metric's name, for example "plasticity/token_entropy".
        threshold: what it has to cross.
        mode: "min" fires below the threshold, "max" above it.
        patience: how many looks in a row it has to be there.
        every_n_steps: look after every so many optimizer steps, instead of after validations and epochs.
        strict: refuse a metric that is not there. Where the sanity check runs the validation, it has to be
            logged then; set this to False for one that is logged later. A look without the metric is then
            passed over.

    Raises:
        MisconfigurationException: at the start of the fit: the metric is unknown, or the fit ends too early for
            ``patience`` looks.
        RuntimeError: at a look, no metric has that name; the message lists those there are.
    """

    def __init__(
        self,
        monitor: str,
        threshold: float,
        mode: Literal["min", "max"] = "min",
        patience: int = 1,
        every_n_steps: int | None = None,
        strict: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise MisconfigurationException(
                f'Expected argument `mode` to be "min" or "max" but got {mode!r}.'
            )
        if not math.isfinite(threshold):
            raise MisconfigurationException(
                f"Expected argument `threshold` to be finite but got {threshold}."
            )
        check_count("patience", patience, 1)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, 1)
        self.monitor = monitor
        self.threshold = threshold
        self.mode = mode
        self.patience = patience
        self.every_n_steps = every_n_steps
        self.strict = strict
        self._crossed = 0
        self._value = math.nan
        self._looked = 0
        self._validated: set[str] | None = None

    @override
    def due(self, trainer: Trainer, epoch: int) -> bool:
        return self._crossed >= self.patience

    @override
    def reason(self) -> str:
        sign = "<" if self.mode == "min" else ">"
        again = f" at {self._crossed} looks in a row" if self.patience > 1 else ""
        return f"since {self.monitor} {self._value:.4g} {sign} {self.threshold:g}{again}"

    @override
    def check(self, trainer: Trainer, *, ends_fit: bool) -> None:
        self._check_known(trainer)
        looks = self._looks(trainer, ends_fit)
        if self.patience > looks:
            raise MisconfigurationException(
                f"Expected the fit to look at {self.monitor!r} at least {self.patience} times before its last update "
                f"but it does so {looks:.0f} times, so that it can never be rejuvenated. Look more often, with "
                "`WhenMetric(every_n_steps=…)` or `Trainer(val_check_interval=…)`, or lower `patience`."
            )

    @override
    def observe_sanity_check(self, trainer: Trainer) -> None:
        self._validated = set(trainer.callback_metrics)

    @override
    def observe(self, trainer: Trainer) -> None:
        if self.every_n_steps is None:
            self._look(trainer)

    @override
    def observe_step(self, trainer: Trainer) -> None:
        if self.every_n_steps is None:
            return
        intervals = trainer.global_step // self.every_n_steps
        if intervals > self._looked:
            self._looked = intervals
            self._look(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"crossed": self._crossed, "value": self._value, "looked": self._looked}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._validated = None
        self._crossed = int(state["crossed"])
        self._value = float(state["value"])
        self._looked = int(state["looked"])

    def _look(self, trainer: Trainer) -> None:
        if self._crossed >= self.patience:
            return  # decided, and waiting for the end of an accumulation or of the fit
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            if self.strict:
                raise RuntimeError(self._unknown(metrics))
            return
        value = float(metrics[self.monitor])
        if math.isnan(value):
            value = math.inf if self.mode == "min" else -math.inf
        if trainer.world_size > 1:  # every rank has to decide alike
            local = torch.tensor(value, device=trainer.strategy.root_device)
            value = float(trainer.strategy.reduce(local, reduce_op=self.mode))
        self._value = value
        crossed = value < self.threshold if self.mode == "min" else value > self.threshold
        self._crossed = self._crossed + 1 if crossed else 0

    def _unknown(self, known: Any) -> str:
        return (
            f"Expected a metric {self.monitor!r} to decide when to rejuvenate but none has that name. Known: "
            f"{listing(known)}. Log it with `self.log`, or add the callback that does; set `strict=False` for one "
            "that is logged later."
        )

    def _check_known(self, trainer: Trainer) -> None:
        """Refuse an unknown name where all names are known already."""
        known = {*trainer.callback_metrics, *(self._validated or ())}
        if not self.strict or self.monitor in known:
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not self.monitor.startswith(PREFIX):
            if self._validated is not None and self.every_n_steps is None:
                raise MisconfigurationException(self._unknown(known))
            return
        if not any(isinstance(callback, PlasticityCallback) for callback in callbacks):
            raise MisconfigurationException(
                f"{self.monitor!r} is measured by `PlasticityCallback`, which is not among the Trainer's callbacks. "
                f"Add it, before this callback. {self._unknown(known)}"
            )

    def _looks(self, trainer: Trainer, ends_fit: bool) -> float:
        """How many looks at most can be acted upon."""
        if self.every_n_steps is not None:
            planned = planned_steps(trainer)
            return planned if math.isinf(planned) else (planned - (not ends_fit)) // self.every_n_steps
        epochs = trainer.max_epochs
        if epochs in (None, -1):
            return math.inf
        interval = 1
        if any(trainer.num_val_batches):
            batches = trainer.val_check_batch
            if (
                trainer.check_val_every_n_epoch is None
                or not batches
                or batches < trainer.num_training_batches
            ):
                return math.inf  # several times an epoch, or by the clock
            interval = trainer.check_val_every_n_epoch
        return (epochs - (not ends_fit)) // interval
