"""The trigger that watches a metric: when it looks, at which value, and which names it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from numbers import Real
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_rejuv._compat import callbacks_of, log_interval
from lightning_rejuv.callbacks._logging import PREFIX
from lightning_rejuv.callbacks._planned import planned_looks, planned_steps
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.callbacks.triggers import Trigger, expect, expect_count
from lightning_rejuv.names import listing


class WhenMetric(Trigger):
    """Fires when a logged metric crosses a threshold, named as in ``EarlyStopping``.

    The trigger looks when a validation or, without one, a training epoch has ended, or else every n steps; what it
    has seen is acted upon before the next update. Any metric in ``trainer.callback_metrics`` works, those of
    :class:`PlasticityCallback` among them. If ranks see different values, the trigger counts a look if the value of
    any rank crosses. At a look every n steps the value logged last counts, in a resumed run as well: checkpoints
    carry it. A look that comes before the first value of a metric that the sanity check has logged is passed over.

    Args:
        monitor: the metric's name, for example "plasticity/token_entropy".
        threshold: the value that it has to cross.
        mode: "min" fires below the threshold, "max" above it.
        patience: at how many looks in a row it has to be beyond the threshold.
        every_n_steps: look after every so many optimizer steps, instead of after validations and epochs.
        strict: refuse a metric that is not logged, on every rank. If the sanity check runs the validation, it
            has to be logged then; set this to False for one that is logged later, or by some ranks only. A look
            without the metric is then passed over.

    Raises:
        MisconfigurationException: an argument of another type or out of range; at the start of the fit: the metric
            is unknown, or the fit ends too early for ``patience`` looks.
        RuntimeError: at a look, no metric has that name, or not on all ranks; the message lists those that are known.
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
        expect(isinstance(monitor, str) and monitor != "", "monitor", "the name of a metric", monitor)
        expect(_is_finite(threshold), "threshold", "a finite number", threshold)
        expect(mode in ("min", "max"), "mode", '"min" or "max"', mode)
        expect_count("patience", patience, 1)
        if every_n_steps is not None:
            expect_count("every_n_steps", every_n_steps, 1)
        expect(isinstance(strict, bool), "strict", "True or False", strict)
        self.monitor = monitor
        self.threshold = threshold
        self.mode = mode
        self.patience = patience
        self.every_n_steps = every_n_steps
        self.strict = strict
        self._never = math.inf if mode == "min" else -math.inf  # a value that does not cross
        self._begin()

    def _begin(self) -> None:
        """Start as a trigger that has seen nothing."""
        self._crossed = 0
        self._value = math.nan
        self._looked = 0
        self._validated: set[str] | None = None
        self._announced = False  # whether the sanity check has logged the metric
        self._metrics: MutableMapping[str, Any] = {}  # those of the fit, which Lightning updates in place
        self._own: float | None = None  # this rank's value when it was last read
        self._last: float | None = None  # that of all ranks then

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
        self._hold(trainer)
        self._check_known(trainer)
        looks = self._looks(trainer, ends_fit)
        if self.patience - self._crossed > looks:
            raise MisconfigurationException(
                f"Expected the fit to look at {self.monitor!r} at least {self.patience} times before its last update "
                f"but it does so {looks:.0f} times, so that the model can never be rejuvenated. Look more often, with "
                "`WhenMetric(every_n_steps=…)` or `Trainer(val_check_interval=…)`, or lower `patience`."
            )

    @override
    def observe_sanity_check(self, trainer: Trainer) -> None:
        self._validated = set(trainer.callback_metrics)
        self._announced = self._announced or self.monitor in self._validated

    @override
    def observe(self, trainer: Trainer) -> None:
        if self.every_n_steps is None:
            self._look(trainer)
        else:
            self._read(trainer)  # for later looks, also in a run that is resumed before the next one

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
        return {
            "crossed": self._crossed,
            "value": self._value,
            "looked": self._looked,
            "monitor": self.monitor,
            "every_n_steps": self.every_n_steps,
            "last": self._latest(),
            "announced": self._announced,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begin()
        every = state.get("every_n_steps", self.every_n_steps)
        if every and self.every_n_steps:  # another number of steps counts other looks
            self._looked = int(state["looked"]) * every // self.every_n_steps
        if state.get("monitor", self.monitor) != self.monitor:
            return  # what was seen is another metric's
        self._crossed = int(state["crossed"])
        self._value = float(state["value"])
        self._last = state.get("last")
        self._announced = bool(state.get("announced", False))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the Trainer's metrics."""
        return {**vars(self), "_metrics": {}, "_last": self._latest()}

    def _hold(self, trainer: Trainer) -> None:
        """Keep hold of the fit's metrics: what is logged after the last look has to be in a checkpoint as well."""
        metrics = trainer.callback_metrics
        if metrics is not self._metrics:
            self._last, self._own = self._latest(), None
            self._metrics = metrics

    def _latest(self) -> float | None:
        """Return the last value of all ranks, or this rank's if another one has been logged since."""
        own = self._current()
        return self._last if own is None or own == self._own else own

    def _current(self) -> float | None:
        """Return this rank's value; None if it has logged none."""
        if self.monitor not in self._metrics:
            return None
        value = float(self._metrics[self.monitor])
        return self._never if math.isnan(value) else value

    def _read(self, trainer: Trainer) -> tuple[float | None, int]:
        """Return the last value over all ranks, if one is known, and how many ranks have it now. A collective."""
        self._hold(trainer)
        self._own = value = self._current()
        ranks = int(_over_ranks(trainer, value is not None, "sum"))
        if not ranks and (self.every_n_steps is not None or not self.strict):
            value = self._last  # a fit that has just been resumed has logged none yet
        if not ranks and not _over_ranks(trainer, value is not None, "sum"):
            return None, 0
        self._last = _over_ranks(trainer, self._never if value is None else value, self.mode)
        return self._last, ranks

    def _look(self, trainer: Trainer) -> None:
        if self._crossed >= self.patience:
            return  # the edit waits for the end of an accumulation or of the fit
        value, ranks = self._read(trainer)
        if self.strict and 0 < ranks < trainer.world_size:
            raise RuntimeError(self._on_some(ranks, trainer))
        if value is None:
            if self.strict and not (self.every_n_steps and _over_ranks(trainer, self._announced, "sum")):
                raise RuntimeError(self._unknown(self._metrics, trainer))
            return
        self._value = value
        crossed = value < self.threshold if self.mode == "min" else value > self.threshold
        self._crossed = self._crossed + 1 if crossed else 0

    def _unknown(self, known: Iterable[str], trainer: Trainer) -> str:
        expected = f"Expected a metric {self.monitor!r} to decide when to rejuvenate but"
        if self.monitor.startswith(PREFIX):
            measured = sorted(name for name in known if name.startswith(PREFIX))
            later = next((w for w in _watchers(trainer) if self._comes_later(w)), None)
            if later is not None:
                every = "validation or epoch" if self.every_n_steps is None else f"{self.every_n_steps} steps"
                return (
                    f"{expected} at this look, after step {trainer.global_step}, `PlasticityCallback` has not measured "
                    f"it yet: it measures the model every {later.every_n_steps} steps and rollouts every "
                    f"{log_interval(trainer)} batches, and the trigger looks after every {every}. Let the looks come "
                    "after the measurements, or set `strict=False`, which passes over a look without the metric. If "
                    f"the name is wrong, correct it; so far there are {measured}."
                )
            return (
                f"{expected} `PlasticityCallback` has measured none of that name. Known: {measured}. Correct the name; "
                "set `strict=False` for one that is measured later."
            )
        return (
            f"{expected} none has that name. Known: {listing(known)}. Log it with `self.log`, or add the callback that "
            "does; set `strict=False` for one that is logged later."
        )

    def _on_some(self, ranks: int, trainer: Trainer) -> str:
        return (
            f"Expected a metric {self.monitor!r} on all {trainer.world_size} ranks to decide when to rejuvenate but "
            f"got it on {ranks} of them. Log it on every rank, without `rank_zero_only=True`; set `strict=False` to go "
            "by the ranks that log it."
        )

    def _check_known(self, trainer: Trainer) -> None:
        """Refuse an unknown name if all names are known already. A collective."""
        if not self.strict:
            return
        known = {*trainer.callback_metrics, *(self._validated or ())}
        ranks = int(_over_ranks(trainer, self.monitor in known, "sum"))
        if ranks == trainer.world_size:
            return
        if not self.monitor.startswith(PREFIX):
            if self._validated is not None and self.every_n_steps is None:
                raise MisconfigurationException(
                    self._on_some(ranks, trainer) if ranks else self._unknown(known, trainer)
                )
            return
        watchers = _watchers(trainer)
        if not watchers:
            raise MisconfigurationException(
                f"{self.monitor!r} is measured by `PlasticityCallback`, which is not among the Trainer's callbacks. "
                "Add it, before this callback."
            )
        measured = any(name.startswith(PREFIX) for name in known)
        if measured and len(watchers) == 1 and not self._comes_later(watchers[0]):
            raise MisconfigurationException(self._unknown(known, trainer))

    def _comes_later(self, watcher: PlasticityCallback) -> bool:
        """Tell whether the metric may be measured in training, and not at its start."""
        monitor = watcher.monitor
        return (
            watcher.track_updates
            or (monitor.probe is None and monitor.records_forwards)
            or any(name in self.monitor for name in monitor.of_rollouts)
        )

    def _looks(self, trainer: Trainer, ends_fit: bool) -> float:
        """Return how many looks can be acted upon at most."""
        if self.every_n_steps is None:
            return planned_looks(trainer, ends_fit=ends_fit)
        planned = planned_steps(trainer)
        if ends_fit and not trainer.lightning_module.automatic_optimization:
            return math.inf  # the last batch may make more steps than planned
        return planned if math.isinf(planned) else (planned - (not ends_fit)) // self.every_n_steps


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _watchers(trainer: Trainer) -> list[PlasticityCallback]:
    return [c for c in callbacks_of(trainer) if isinstance(c, PlasticityCallback)]


def _over_ranks(trainer: Trainer, value: float, how: str) -> float:
    """Reduce a number over all ranks, so that each decides alike."""
    if trainer.world_size == 1:
        return float(value)
    number = torch.tensor(float(value), device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(number, reduce_op=how))
