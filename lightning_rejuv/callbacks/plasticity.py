"""When a model's plasticity is measured in a fit: the Lightning callback around a PlasticityMonitor."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_rejuv._compat import (
    callbacks_of,
    first_logged_step,
    language_model,
    log_interval,
    logged_step,
    outermost,
)
from lightning_rejuv.callbacks import _logging as log
from lightning_rejuv.callbacks._once_per_run import OncePerRun
from lightning_rejuv.callbacks._planned import share_done
from lightning_rejuv.callbacks._rollouts import EntropyAlarms, Rollouts
from lightning_rejuv.functional._checks import check_count
from lightning_rejuv.loggers import takes_figures
from lightning_rejuv.metrics.monitor import PlasticityMonitor
from lightning_rejuv.metrics.weights import StepMeasures


class PlasticityCallback(Callback):
    """Drive a :class:`PlasticityMonitor`: measure at the start, every n steps and at the end; log it.

    Values go to every logger under ``plasticity/…`` and into ``trainer.callback_metrics``, where ``ModelCheckpoint``
    or ``EarlyStopping`` can watch them; one layer × module map for each measure goes to ``plasticity_map/…``. The
    language model is the only Hugging Face model inside the LightningModule, the only one that is trained, or the
    attribute ``language_model``; else the LightningModule itself. Training is not touched: weights come out bit for
    bit as without the callback (except if a compiled model is recorded without a probe: that step runs eagerly).

    With a probe the model is run on it. Without one, activations and entropy are recorded from the training step
    itself, on whatever batch it has: this is cheaper, but no fixed yardstick.

    Rollouts are taken from the key ``rewards`` ``[prompts, group]`` of what ``training_step`` returns, on every rank
    or on none; their measures are averaged over ``trainer.log_every_n_steps`` steps and logged as often. After the
    fit the monitor's verdict uses the values that were logged last. With rollouts the two alarms of arXiv 2606.18487
    watch ``entropy`` of the same dict, one number, or the probe's; checkpoints carry what the alarms have seen and
    raised. Rewards and entropy may be tensors, arrays of NumPy or lists of numbers; anything else, or of another
    shape, is left out, with one warning.

    Args:
        monitor: what to measure.
        every_n_steps: steps between two measurements of the model: batches after which an optimizer has stepped.
        figure_every_n_steps: steps between two sets of maps; they are drawn at the end and at a
            rejuvenation as well. 0 stands for no figures at all.
        per_layer: also write every layer's scalars and the histograms of the neurons' scores.
        custom_layout: give TensorBoard a custom-scalars layout of the charts that have data; it replaces one that
            the run already has.
        track_updates: also measure gradient norm, gradient dormancy and update size, every n steps; takes a
            copy of the trained weights during these steps.

    Raises:
        TypeError: ``monitor`` is no PlasticityMonitor.
        ValueError: ``every_n_steps`` is not positive, or ``figure_every_n_steps`` negative.

    Example::
        >>> callback = PlasticityCallback(PlasticityMonitor(), every_n_steps=100)
    """

    def __init__(
        self,
        monitor: PlasticityMonitor,
        every_n_steps: int = 50,
        *,
        figure_every_n_steps: int = 500,
        per_layer: bool = False,
        custom_layout: bool = False,
        track_updates: bool = False,
    ) -> None:
        if not isinstance(monitor, PlasticityMonitor):
            raise TypeError(
                f"Expected argument `monitor` to be a PlasticityMonitor but got {type(monitor).__name__}."
            )
        check_count("every_n_steps", every_n_steps)
        check_count("figure_every_n_steps", figure_every_n_steps, at_least=0)
        self.monitor = monitor
        self.every_n_steps = every_n_steps
        self.figure_every_n_steps = figure_every_n_steps
        self.per_layer = per_layer
        self.custom_layout = custom_layout
        self.track_updates = track_updates
        self._state_key = ""
        self._begin_run()
        self._begin(0, 0)

    def _begin_run(self) -> None:
        """Forget what checkpoints carry."""
        self._alarms = EntropyAlarms()
        self._rejuvenated = False

    def _begin(self, step: int, optimizer_steps: int) -> None:
        self._measured_at = self._drawn_at = step
        self._optimizer_steps = optimizer_steps
        self._hooks = ExitStack()
        self._attached = False
        self._step_measures: StepMeasures | None = None
        self._before: dict[str, Tensor] = {}
        self._rollouts = Rollouts()
        self._charts = log.ChartLayout()

    @property
    @override
    def state_key(self) -> str:
        """The class, followed by a number if it is not the first of its class on a Trainer."""
        # A new Trainer refuses two callbacks with equal keys.
        return self._state_key or f"{type(self).__qualname__} {id(self)}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        alike = [c for c in callbacks_of(trainer) if type(c) is type(self)]
        number = alike.index(self) + 1 if self in alike else 1
        self._state_key = type(self).__qualname__ + (f"-{number}" if number > 1 else "")
        # A second fit of the same Trainer goes on with its run.
        if stage == "fit" and not trainer.global_step:
            self._begin_run()

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.state_key not in checkpoint["callbacks"]:
            self._begin_run()  # the checkpoint is of a run without this callback

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"alarms": self._alarms.state_dict(), "rejuvenated": self._rejuvenated}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._alarms = EntropyAlarms.restore(state_dict["alarms"])
        self._rejuvenated = state_dict["rejuvenated"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the run starts from, the first moment when restored weights are in place."""
        self.monitor.to(pl_module.device)
        self.monitor.reset()
        self._begin(first_logged_step(trainer), trainer.global_step)
        if trainer.global_step:
            self._alarms.resume()
        # A run that is resumed after a rejuvenation.
        self._rejuvenated |= any(
            isinstance(c, OncePerRun) and c.rejuvenated_at for c in callbacks_of(trainer)
        )
        takes_figures(trainer.loggers)
        if self.monitor.probe is not None:
            text = f"probe {self.monitor.probe.hash}: {self.monitor.probe.positions} response positions"
            log.log_event(trainer, "probe", text, self._measured_at)
        self.monitor.begin_fit(outermost(trainer), resumed=trainer.global_step > 0)
        if self.monitor.measures_model:
            self._measure(trainer, pl_module, self._measured_at)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hook the model if this step is to be recorded."""
        self._attach_if_due(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradient, before it is clipped."""
        if self.track_updates and self._due(trainer) and self._step_measures is None:
            self._step_measures = StepMeasures()
            self._step_measures.before(language_model(pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step's rollouts; measure if n steps have passed."""
        recorded = self._detach()
        before = logged_step(trainer)
        if isinstance(outputs, Mapping):
            entropy = self._rollouts.take(outputs, self.monitor)
            if entropy is not None:
                self._watch(trainer, "rollouts", entropy, before)
        interval, stepped = log_interval(trainer), trainer.global_step != self._optimizer_steps
        # Rollouts of batches whose gradients are accumulated belong to the step that these make.
        whole = stepped or not pl_module.automatic_optimization
        if interval and whole and (before + 1) % interval == 0:
            self._log_rollouts(trainer, before)
        if not stepped:
            return
        due = self._due(trainer)
        self._optimizer_steps = trainer.global_step
        if due and (recorded or self.monitor.measures_model or self._step_measures is not None):
            self._measure(trainer, pl_module, before + 1, recorded=recorded)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the run ends with."""
        self._log_rollouts(trainer, logged_step(trainer))
        step = logged_step(trainer)
        if self.monitor.measures_model and step != self._measured_at:
            self._measure(trainer, pl_module, step, draw=True)
        elif step != self._drawn_at:
            self._draw(trainer, step)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._detach()

    def on_before_rejuvenation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model that is about to be edited; called by RejuvenationCallback."""
        self._log_rollouts(trainer, logged_step(trainer))
        if self._detach():
            self.monitor.reset_model()
        if self.monitor.measures_model:
            self._before = self._measure(trainer, pl_module, logged_step(trainer))

    def on_rejuvenation(self, trainer: Trainer, pl_module: LightningModule, summary: str) -> None:
        """Measure the edited model at the same step, at which the curves then jump; draw it beside the model before.

        Args:
            trainer: the Trainer.
            pl_module: the LightningModule.
            summary: what was done, one line.
        """
        step = logged_step(trainer)
        self._rejuvenated = True
        self._alarms.begin_again()
        self.monitor.reset_rollouts()  # these were the model's before the edit
        log.log_event(trainer, "rejuvenated", f"rejuvenated here, before step {step}: {summary}", step)
        if not self.monitor.measures_model:
            self._log(trainer, {"rejuvenated": torch.tensor(1.0)}, step)
        else:
            after = self._measure(trainer, pl_module, step, draw=True)
            if self.figure_every_n_steps:
                base = {} if self.monitor.reference is None else self.monitor.reference.values
                log.log_before_after(trainer, self._before, after, base, step)
        self._attach_if_due(trainer, pl_module)

    def _log(self, trainer: Trainer, values: Mapping[str, Tensor], step: int) -> None:
        names = log.log_values(trainer, values, step)
        if self.custom_layout:
            self._charts.add(trainer, names)

    def _due(self, trainer: Trainer) -> bool:
        """Tell whether the step at hand completes another n; steps are compared by level, so that none is missed."""
        return (logged_step(trainer) + 1) // self.every_n_steps > self._measured_at // self.every_n_steps

    def _attach_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        records = self.monitor.probe is None and self.monitor.records_forwards
        if records and self._due(trainer) and not self._attached:
            self.monitor.reset_model()
            self._hooks.enter_context(self.monitor.attach(pl_module))
            self._attached = True

    def _detach(self) -> bool:
        attached, self._attached = self._attached, False
        self._hooks.close()
        return attached

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        *,
        recorded: bool = False,
        draw: bool = False,
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if recorded:
            self.monitor.measure_drift(outermost(trainer))
            values = self.monitor.compute_model()
        elif self.monitor.measures_model:
            with trainer.precision_plugin.forward_context():
                values = self.monitor.measure(outermost(trainer))
        if self._step_measures is not None:
            values = {**values, **self._step_measures.after(language_model(pl_module))}
        self._measured_at = step
        rejuvenated = torch.tensor(float(self._rejuvenated))
        self._log(trainer, {**values, "rejuvenated": rejuvenated}, step)
        if "token_entropy" in values:
            self._watch(trainer, "probe", float(values["token_entropy"]), step)
        if self.per_layer:
            names = log.log_layers(trainer, self.monitor, step)
            if self.custom_layout:
                self._charts.add(trainer, names)
        every = self.figure_every_n_steps
        if draw or (every and step // every > self._drawn_at // every):
            self._draw(trainer, step)
        self._step_measures = None
        return values

    def _draw(self, trainer: Trainer, step: int) -> None:
        self._drawn_at = step
        if not self.figure_every_n_steps:
            return
        layers = self.monitor.layer_values()
        if self._step_measures is not None:
            layers["gradient_dormancy"] = self._step_measures.layers
        log.log_maps(trainer, layers, step)

    def _log_rollouts(self, trainer: Trainer, step: int) -> None:
        """Log the rollouts since the last time, at the step of the newest batch's own values."""
        values = self.monitor.close_rollouts()
        if values:
            self._log(trainer, values, step)

    def _watch(self, trainer: Trainer, source: str, entropy: float, step: int) -> None:
        """Raise the RL stage's alarms, each once."""
        reference = self.monitor.reference if source == "probe" else None
        base = None if reference is None else reference.values.get("token_entropy")
        progress = share_done(trainer, self._optimizer_steps) if self._rollouts.seen else None
        for name, text in self._alarms.watch(source, entropy, progress, base, self._rejuvenated):
            rank_zero_warn(text)
            log.log_event(trainer, f"alarm/{name}", text, step)
