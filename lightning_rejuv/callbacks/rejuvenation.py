"""When a model is rejuvenated: the Lightning callback around :func:`lightning_rejuv.rejuvenate`."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_rejuv._compat import language_model, logged_step
from lightning_rejuv.access.optimizer_state import OptimizerState
from lightning_rejuv.access.targets import Targets, open_targets
from lightning_rejuv.attribution import PositionRule, RankBy, Scope
from lightning_rejuv.calibration import as_batches
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.callbacks.triggers import AtEpoch, AtStart, Trigger
from lightning_rejuv.loggers import log_scalars
from lightning_rejuv.neurons import take_apart
from lightning_rejuv.options import Alpha, Budget, Options, Quantity, Rounding
from lightning_rejuv.plan import Data, Plan, make_plan
from lightning_rejuv.rejuvenate import carry_out
from lightning_rejuv.report import RejuvenationReport

# Strategies that hold every parameter whole on every rank.
_REPLICATING = (SingleDeviceStrategy, DDPStrategy)


class RejuvenationCallback(Callback):
    """Rejuvenate a model before an update: the first of a fit, that of an epoch, or when a trigger fires.

    The edit is made in ``on_train_batch_start``, the only hook that always runs before the first update,
    so that weights, the record that it was done, metrics and checkpoints agree; after a resume it is not
    made again. The language model inside the LightningModule is found by itself. The report is written
    to ``rejuvenation.json`` in the log directory and its figures to the loggers under ``rejuvenation/``.

    A LightningModule brings the data along, in methods of its own:

    - ``calibration_dataloader()`` returns (prompt, response) batches for the reset, where the callback
      is not given ``calibration``;
    - ``sample_responses()`` returns responses that the module samples with the weights it holds at that
      moment, as batches of the same form, to find alpha; without it the model's ``generate`` samples
      from the calibration prompts;
    - ``verify_responses(batch)`` says which of them are right, for ``alpha="support_retention"``.

    Args:
        anchor: the base: its directory, a ``.safetensors`` file or a checkpoint; in Python also a module
            or a state dict. None for a model with LoRA adapters.
        at_start: rejuvenate before the first update of the fit: the RL stage that starts from an SFT model.
        at_epoch: rejuvenate before the first update of this epoch, counted from 0: the end of SFT.
        when: any other moment: a trigger of :mod:`lightning_rejuv.callbacks.triggers`, such as
            ``WhenMetric("plasticity/token_entropy", threshold=0.1)`` or ``Every(epochs=8)``.
        alpha: weight of the SFT model in the fusion, 0 to 1, or one for each name pattern, or a rule that
            finds it: "auto", "support_retention", "kl_balance" or "entropy_ratio".
        reset_fraction: share of all neurons that is reset to the base; 0 is fusion alone.
        omega: weight of the base on a reset neuron.
        calibration: (prompt, response) batches; by default those of ``calibration_dataloader()``.
        positions: "sharpened" or "entropy_gap": where neurons are attributed.
        positions_per_response: at how many positions of a response, at most.
        quantity: "target_logit" or "entropy_gradient": what neurons are attributed.
        rank_by: "absolute", "signed" or, as a control, "random".
        scope: what neurons compete in: "model", "layer" or "module".
        budget: "share" of the neurons, or the paper's "union" of the top share at each position.
        alpha_target: what a rule for alpha may reach; the rule's default by default.
        optimizer_state: what the optimizers forget of edited weights: "momentum", "reset" or "keep".
        resize_vocabulary: where SFT added tokens, fuse the common rows and keep the new ones.
        rounding: of bfloat16 parameters, "nearest" or "stochastic".
        seed: of the random control, of sampling and of stochastic rounding.

    Attributes:
        report: what was done last, a :class:`RejuvenationReport`; None before it happens.

    Raises:
        MisconfigurationException: not exactly one of ``at_start``, ``at_epoch`` and ``when``; at the start of the
            fit: no calibration data, no sampler, a strategy that shards parameters.
        ValueError: an argument out of range; at the start of the fit: an anchor that does not match.

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
        when: Trigger | None = None,
        alpha: Alpha = 0.5,
        reset_fraction: float = 0.01,
        omega: float = 1.0,
        calibration: Any = None,
        positions: PositionRule = "sharpened",
        positions_per_response: int = 1,
        quantity: Quantity = "target_logit",
        rank_by: RankBy = "absolute",
        scope: Scope = "model",
        budget: Budget = "share",
        alpha_target: float | None = None,
        optimizer_state: OptimizerState = "momentum",
        resize_vocabulary: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        given = [at_start, at_epoch is not None, when is not None]
        if sum(given) != 1:
            raise MisconfigurationException(
                "Expected exactly one of `at_start=True`, `at_epoch=<epoch>` and `when=<trigger>` but got "
                f"at_start={at_start}, at_epoch={at_epoch}, when={when}: say when to rejuvenate."
            )
        self.report: RejuvenationReport | None = None
        self._anchor = anchor
        self._trigger = when or (AtStart() if at_epoch is None else AtEpoch(at_epoch))
        self._calibration = calibration
        self._options = Options(
            alpha=alpha,
            reset_fraction=reset_fraction,
            omega=omega,
            positions=positions,
            positions_per_response=positions_per_response,
            quantity=quantity,
            rank_by=rank_by,
            scope=scope,
            budget=budget,
            alpha_target=alpha_target,
            optimizer_state=optimizer_state,
            rounding=rounding,
            seed=seed,
        )
        self._resize_vocabulary = resize_vocabulary
        self._armed = True
        self._fresh = deepcopy(self._trigger.state_dict())

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # A new fit is a new run; where it resumes one, load_state_dict comes after this hook.
            self._armed = True
            self._trigger.load_state_dict(self._fresh)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work before any training is done."""
        if not self._armed:
            return
        if not isinstance(trainer.strategy, _REPLICATING):
            raise MisconfigurationException(
                f"Expected one device or DDP but got {type(trainer.strategy).__name__}: the callback does not edit "
                "sharded parameters. Use `lightning_rejuv.rejuvenate` on the checkpoint before this fit."
            )
        self._trigger.check(trainer)
        model = language_model(pl_module)
        open_targets(model, self._anchor, self._resize_vocabulary)
        if self._options.reset_fraction > 0:
            take_apart(model)
        if self._needs_calibration(pl_module):
            as_batches(self._calibration_of(pl_module))
        if self._options.searches_alpha:
            self._check_sampler(pl_module, model)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._armed or not self._trigger.due(trainer):
            return
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients of the old weights are half accumulated: wait for the next step
        self._rejuvenate(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._armed and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._trigger.observe(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._armed and not any(trainer.num_val_batches):
            self._trigger.observe(trainer)

    def _rejuvenate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watchers = [c for c in _callbacks(trainer) if isinstance(c, PlasticityCallback)]
        for watcher in watchers:
            watcher.on_before_rejuvenation(trainer, pl_module)
        started = time.perf_counter()
        model = language_model(pl_module)
        targets = open_targets(model, self._anchor, self._resize_vocabulary)
        plan = self._plan(trainer, pl_module, model, targets)
        report = carry_out(model, targets, plan, self._options, trainer.optimizers, started)
        self.report = report = trainer.strategy.broadcast(report)
        self._armed = self._trigger.fired(trainer)
        rank_zero_info(f"Rejuvenated before step {trainer.global_step}: {report.summary()}")
        log_scalars(trainer.loggers, _scalars(report), logged_step(trainer))
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on every rank
        if trainer.is_global_zero:
            directory.mkdir(parents=True, exist_ok=True)
            report.save(directory / "rejuvenation.json")
        for watcher in watchers:
            watcher.on_rejuvenation(trainer, pl_module, report.summary())

    def _plan(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module, targets: Targets) -> Plan:
        """Plan on rank zero alone and hand the plan round: every rank has to make the same edit."""
        made: Plan | None = None
        failure: Exception | None = None
        if trainer.is_global_zero:
            sample = getattr(pl_module, "sample_responses", None)
            data = Data(
                calibration=self._calibration_of(pl_module) if self._needs_calibration(pl_module) else None,
                sampler=None if sample is None else lambda _model: sample(),
                verifier=getattr(pl_module, "verify_responses", None),
            )
            try:
                made = make_plan(model, targets, data, self._options)
            except Exception as error:  # the other ranks wait for it
                failure = error
        message = None if failure is None else f"Planning failed on rank 0: {failure}"
        theirs = None if made is None else replace(made, batches=[])
        theirs, message = trainer.strategy.broadcast((theirs, message))
        if failure is not None:
            raise failure
        if message is not None:
            raise RuntimeError(message)
        plan = made or theirs
        assert plan is not None
        return plan

    def _needs_calibration(self, pl_module: LightningModule) -> bool:
        samples_itself = hasattr(pl_module, "sample_responses")
        return self._options.reset_fraction > 0 or (self._options.searches_alpha and not samples_itself)

    def _calibration_of(self, pl_module: LightningModule) -> Any:
        if self._calibration is not None:
            return self._calibration
        loader = getattr(pl_module, "calibration_dataloader", None)
        if loader is None:
            raise MisconfigurationException(
                f"`alpha={self._options.alpha!r}` with `reset_fraction={self._options.reset_fraction}` needs "
                f"calibration data: pass `calibration=<batches>`, give {type(pl_module).__name__} a "
                "`calibration_dataloader()` that returns them, or set `reset_fraction=0` and a number for `alpha`."
            )
        return loader()

    def _check_sampler(self, pl_module: LightningModule, model: nn.Module) -> None:
        if not hasattr(pl_module, "sample_responses") and not hasattr(model, "generate"):
            raise MisconfigurationException(
                f"`alpha={self._options.alpha!r}` needs responses that the anchor samples, and "
                f"{type(model).__name__} has no `generate`: give {type(pl_module).__name__} a method "
                "`sample_responses()` that returns them as batches, or set `alpha` to a number."
            )
        if self._options.alpha == "support_retention" and not hasattr(pl_module, "verify_responses"):
            raise MisconfigurationException(
                f'`alpha="support_retention"` needs a verifier: give {type(pl_module).__name__} a method '
                '`verify_responses(batch)` that returns which are right, or use `alpha="auto"`.'
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"armed": self._armed, "trigger": self._trigger.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._armed = bool(state_dict["armed"])
        self._trigger.load_state_dict(state_dict["trigger"])


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _scalars(report: RejuvenationReport) -> dict[str, float]:
    values: dict[str, float] = {
        "drift_before": report.drift_before,
        "drift_after": report.drift_after,
        "neurons_reset": float(report.neurons_reset),
    }
    if isinstance(report.alpha, float):
        values["alpha"] = report.alpha
    if report.comparison:
        values["token_entropy_before"] = report.comparison.entropy_before
        values["token_entropy_after"] = report.comparison.entropy_after
        values["token_entropy_anchor"] = report.comparison.entropy_base
    return {f"rejuvenation/{name}": value for name, value in values.items()}
