"""Measuring plasticity while a Trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_rejuv._compat import language_model, log_interval, logged_step
from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.loggers import log_scalars
from lightning_rejuv.metrics.monitor import PlasticityMonitor


class PlasticityCallback(Callback):
    """Drive a :class:`PlasticityMonitor`: measure at the start, every n steps and at the end; log it.

    Values go to every logger under ``plasticity/…`` and into ``trainer.callback_metrics``, where
    ``ModelCheckpoint`` or ``EarlyStopping`` can watch them. The language model is the only Hugging Face model
    inside the LightningModule, or else the LightningModule itself. Training is not touched: weights come out
    bit for bit as they do without the callback.

    Rollouts are taken from the key ``rewards`` ``[prompts, group]`` of what ``training_step`` returns; their
    measures are averaged over, and logged every, ``trainer.log_every_n_steps`` steps.

    Args:
        monitor: what to measure, with a probe, an anchor or both; with neither only rollouts are measured.
        every_n_steps: optimizer steps between two measurements of the model.

    Raises:
        TypeError: ``monitor`` is no PlasticityMonitor.
        ValueError: ``every_n_steps`` is not positive.
    """

    def __init__(self, monitor: PlasticityMonitor, every_n_steps: int = 50) -> None:
        if not isinstance(monitor, PlasticityMonitor):
            raise TypeError(
                f"Expected argument `monitor` to be a PlasticityMonitor but got {type(monitor).__name__}."
            )
        check_count("every_n_steps", every_n_steps)
        self.monitor = monitor
        self.every_n_steps = every_n_steps
        self._measured_at = 0
        self._optimizer_steps = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the run starts from, the first moment when restored weights are in place."""
        self.monitor.to(pl_module.device)
        self.monitor.reset()
        self._optimizer_steps = trainer.global_step
        self._measure(trainer, pl_module, logged_step(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's rollouts; measure where n steps have passed."""
        before = logged_step(trainer)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("rewards"), Tensor):
            self.monitor.update(outputs["rewards"])
        if trainer.global_step == self._optimizer_steps:
            return
        self._optimizer_steps = trainer.global_step
        after = before + 1
        interval = log_interval(trainer)
        if interval and after % interval == 0:
            self._log_rollouts(trainer, before)
        if after // self.every_n_steps > self._measured_at // self.every_n_steps:
            self._measure(trainer, pl_module, after)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the run ends with."""
        self._log_rollouts(trainer, logged_step(trainer))
        if logged_step(trainer) != self._measured_at:
            self._measure(trainer, pl_module, logged_step(trainer))

    def _measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._measured_at = step
        if not self.monitor.measures_model:
            return
        with trainer.precision_plugin.forward_context():
            values = self.monitor.measure(language_model(pl_module))
        self._log(trainer, values, step)

    def _log_rollouts(self, trainer: Trainer, step: int) -> None:
        """Log what came in since the last time, where the newest batch's own values are logged."""
        values = self.monitor.compute_rollouts()
        if values:
            self._log(trainer, values, step)
            self.monitor.reset_rollouts()

    def _log(self, trainer: Trainer, values: dict[str, Tensor], step: int) -> None:
        named = {f"plasticity/{name}": value for name, value in values.items()}
        trainer.callback_metrics.update(named)
        log_scalars(trainer.loggers, named, step)
