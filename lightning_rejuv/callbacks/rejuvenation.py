"""When a model is rejuvenated: the Lightning callback around :func:`lightning_rejuv.rejuvenate`."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from typing_extensions import override

from lightning_rejuv._compat import callbacks_of, fast_dev_run, language_model
from lightning_rejuv.apply_plan import apply_plan, find_copies
from lightning_rejuv.callbacks._checks import check_arguments, check_neighbours, check_start, module_data
from lightning_rejuv.callbacks._initial_weights import forget_initial_weights, initial_weights
from lightning_rejuv.callbacks._logging import announce, check_report_path, save_rejuvenated
from lightning_rejuv.callbacks._once_per_run import OncePerRun
from lightning_rejuv.callbacks._training import (
    Accumulation,
    LastingEdit,
    as_in_training,
    averaged_models,
    warn_of_copies,
)
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.callbacks.triggers import Trigger, one_trigger
from lightning_rejuv.config import Alpha, OptimizerState, Options, Refit, Reset, Rounding
from lightning_rejuv.make_plan import Findings, make_plan
from lightning_rejuv.metrics._base import is_init
from lightning_rejuv.plan import Plan
from lightning_rejuv.plan_on_rank_zero import make_plan_on_rank_zero
from lightning_rejuv.rejuvenate import carry_out
from lightning_rejuv.report.report import RejuvenationReport
from lightning_rejuv.weights.open_targets import open_targets
from lightning_rejuv.weights.replica import Replica
from lightning_rejuv.weights.targets import Targets


class RejuvenationCallback(OncePerRun):
    """Rejuvenate a model in a fit: at its start, at an epoch, when a trigger fires, or at its end.

    The edit is made in ``on_train_batch_start``, the only hook that always runs before the first update (and
    at the end of the fit in ``on_train_end``), so that weights, the record that it was done, metrics and
    checkpoints agree. It is made exactly once: a checkpoint knows whether it holds edited weights, and a fit
    that resumes it (``ckpt_path``) does not edit them again; nor does a second ``fit`` of the same Trainer.
    A new Trainer starts a new run, also from weights alone (``save_weights_only=True``). The edit waits while
    gradients are half accumulated; with manual optimization it waits for a batch in which an optimizer has stepped.

    The language model inside the LightningModule is found without being named. The report is written to
    ``rejuvenation.json`` beside the checkpoints or, without any, beside the logs; its figures go to the loggers
    under ``rejuvenation/``. A LightningModule brings the data along, in methods of its own:

    - ``calibration_dataloader()`` returns (prompt, response) batches, on which alpha is checked, neurons are
      chosen and a refit trains, if the callback is not given ``calibration``;
    - ``sample_responses(model)`` returns responses that the language model it is given samples, as batches
      of the same form, to find alpha and to refit; without it the model's ``generate`` samples from the calibration
      prompts;
    - ``verify_responses(batch)`` says which sampled responses are right: the alpha that was found is then checked.

    Args:
        anchor: the base: its directory, a ``.safetensors`` file or a checkpoint; in Python also a module
            or a state dict. None for a model with LoRA adapters. "init" for the weights at the start of the
            fit, which are then written to the log directory; a resumed run needs their file.
        at_start: rejuvenate before the first update of the fit, for an RL stage that starts from an SFT model.
        at_epoch: rejuvenate before the first update of this epoch, counted from 0.
        at_end: rejuvenate after the last update, at the end of SFT. If the Trainer has a ``ModelCheckpoint``,
            the edited model is saved as ``rejuvenated.ckpt`` beside its files, which hold the weights before.
        when: any other moment: a trigger of :mod:`lightning_rejuv.callbacks`, such as
            ``WhenMetric("plasticity/token_entropy", threshold=0.1)`` or ``Every(epochs=8)``.
        stop_after: end the fit with the rejuvenation: no update follows, and as with ``at_end`` the edited model
            is what the fit ends with. It reaches ``min_epochs`` and ``min_steps`` first, as with EarlyStopping.
        name: tells callbacks of one Trainer apart, in checkpoints, files and logs; two or more need one each.
        alpha: weight of the SFT model in the fusion: "auto", 0.4 unless the data speak against it; or a
            number, 0 to 1; or one for each name pattern.
        reset: which neurons are reset, how many and how: ``Reset(fraction=0.02)``, in YAML ``{fraction: 0.02}``; see
            :class:`Reset`. None, the default, is fusion alone.
        refit: a few plain training steps after the edit, on calibration responses and the base's own samples:
            ``Refit(steps=20)``, in YAML ``{steps: 20}``.
        calibration: (prompt, response) batches; by default those of ``calibration_dataloader()``.
        optimizer_state: what the optimizers forget of edited weights: "momentum", "reset" or "keep".
        resize_vocabulary: if SFT added tokens, fuse the common rows and keep the new ones.
        rounding: of parameters in bfloat16 and float16, "stochastic" or "nearest".
        seed: of the random control, of sampling, of stochastic rounding and of the order of a refit.

    Attributes:
        report: what was done last, a :class:`RejuvenationReport`; None before it happens.
        rejuvenated_at: for each time it was done in this run, how many updates had been made.

    Raises:
        MisconfigurationException: not exactly one of ``at_start``, ``at_epoch``, ``at_end`` and ``when``, or data that
            nothing needs; at the start of the fit: a moment that can never come, no calibration data, no sampler, a
            ``StochasticWeightAveraging`` beside it.
        ValueError: an argument out of range; at the start of the fit: an anchor that does not match or
            is not finite, an optimizer that holds weights where they cannot be edited.

    Example::
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RejuvenationCallback("base/", at_start=True)], logger=False)
    """

    def __init__(
        self,
        anchor: Any,
        *,
        at_start: bool = False,
        at_epoch: int | None = None,
        at_end: bool = False,
        when: Trigger | None = None,
        stop_after: bool = False,
        name: str | None = None,
        alpha: Alpha = "auto",
        reset: Reset | None = None,
        refit: Refit | None = None,
        calibration: Any = None,
        optimizer_state: OptimizerState = "momentum",
        resize_vocabulary: bool = False,
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ) -> None:
        trigger = one_trigger(at_start, at_epoch, at_end, when)
        super().__init__(trigger, name)
        self.report: RejuvenationReport | None = None
        self._anchor = anchor
        self._from_init = is_init(anchor)
        self._stop_after = stop_after
        self._calibration = calibration
        self._options = Options(
            alpha=alpha,
            reset=reset,
            refit=refit,
            optimizer_state=optimizer_state,
            rounding=rounding,
            seed=seed,
        )
        check_arguments(anchor, trigger, stop_after, name, calibration, self._options)
        self._resize_vocabulary = resize_vocabulary
        self._accumulation = Accumulation()
        self._new_file: dict[str, str] | None = None  # of initial weights, if this fit wrote it
        self._lasting: LastingEdit | None = None
        self._told: set[str] = set()

    @property
    @override
    def _at_end(self) -> bool:
        return self._stop_after or self._trigger.at_end

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._new_file = self._lasting = None
        self._told = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work before any training is done."""
        self._trained, self._begun = True, False
        self._accumulation.begin(trainer)
        if not self._run.armed:
            return
        if not fast_dev_run(trainer):
            self._trigger.check(trainer, ends_fit=self._at_end)
        check_neighbours(trainer, self, self._trigger, ends_fit=self._at_end)
        check_report_path(trainer)
        warn_of_copies(trainer, pl_module, self._told)
        model = language_model(pl_module)
        due = not self._trigger.at_end and self._trigger.due(trainer, trainer.current_epoch)
        with isolate_rng():
            if self._from_init:
                record, new = initial_weights(trainer, model, self._run.initial_weights, due_now=due)
                self._run.initial_weights = record
                self._new_file = record if new else self._new_file
            targets = self._targets(model, trainer.strategy.model)
            check_start(trainer, pl_module, model, targets, self._calibration, self._options, due_now=due)
        self._stop_if_due(trainer, trainer.current_epoch)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begun = True
        if not self._run.armed:
            return
        self._look()
        if self._at_end or not self._trigger.due(trainer, trainer.current_epoch):
            return
        if not self._accumulation.unfinished(trainer, batch_idx):
            self._rejuvenate(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._lasting is not None and not self._lasting.goes_on(trainer):
            self._lasting = None
        if self._run.armed:
            self._accumulation.after_batch(trainer)
            self._trigger.observe_step(trainer)
            self._stop_if_due(trainer, trainer.current_epoch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._run.armed or trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.sanity_checking:
            self._trigger.observe_sanity_check(trainer)
        else:
            self._trigger.observe(trainer)
            self._stop_if_due(trainer, trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._run.armed:
            return
        if not any(trainer.num_val_batches):
            self._unseen = trainer
        self._stop_if_due(trainer, trainer.current_epoch + 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._run.armed:
            return
        self._look()
        if self._at_end and self._trigger.due(trainer, trainer.current_epoch):
            self._rejuvenate(trainer, pl_module)
            save_rejuvenated(trainer, self._name)
        elif not self._run.done_at:
            rank_zero_info(f"Not rejuvenated in this fit: {type(self._trigger).__name__} did not come due.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if not self._begun:  # a fit that is refused leaves nothing behind
            forget_initial_weights(trainer, self._new_file)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lasting = None  # it holds on to parameters
        if stage == "fit" and fast_dev_run(trainer):
            forget_initial_weights(trainer, self._new_file)

    def _stop_if_due(self, trainer: Trainer, epoch: int) -> None:
        if (
            self._stop_after
            and self._trigger.due(trainer, epoch)
            and not self._accumulation.unfinished(trainer)
        ):
            trainer.should_stop = True

    def _targets(self, model: nn.Module, root: nn.Module | None = None) -> Targets:
        anchor = self._anchor
        if self._from_init:
            assert self._run.initial_weights is not None
            anchor = self._run.initial_weights["path"]
        return open_targets(model, anchor, self._resize_vocabulary, root)

    def _rejuvenate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watchers = [c for c in callbacks_of(trainer) if isinstance(c, PlasticityCallback)]
        for watcher in watchers:
            watcher.on_before_rejuvenation(trainer, pl_module)
        warn_of_copies(trainer, pl_module, self._told)
        started = time.perf_counter()
        model = language_model(pl_module)
        with as_in_training(trainer):
            targets = self._targets(model, trainer.strategy.model)
            averages = [self._targets(average) for average in averaged_models(trainer)]
            plan, findings, replica = self._plan(pl_module, model, targets)
            # This may refuse, and does so before anything is marked as edited.
            find_copies(targets, trainer.optimizers, self._options)
            lasting = LastingEdit(targets)
            with self._run.edit():
                report = carry_out(
                    model, targets, plan, findings, self._options, trainer.optimizers, started, replica
                )
                for average in averages:
                    apply_plan(average, plan, self._options)
                reason = self._trigger.fired(trainer)
                self._run.armed = self._trigger.repeats
                self._run.done_at.append(trainer.global_step)
        lasting.begin(trainer)
        self._lasting = lasting
        self.report = report = trainer.strategy.broadcast(report)
        announce(trainer, report, reason, self._name, at_end=self._at_end, repeats=self._trigger.repeats)
        for watcher in watchers:
            watcher.on_rejuvenation(trainer, pl_module, report.summary())

    def _plan(
        self, pl_module: LightningModule, model: nn.Module, targets: Targets
    ) -> tuple[Plan, Findings, Replica | None]:
        data = module_data(pl_module, self._calibration, self._options)
        if not (dist.is_available() and dist.is_initialized()):
            return *make_plan(model, targets, data, self._options), None
        return make_plan_on_rank_zero(model, targets, data, self._options)
