"""What a RejuvenationCallback refuses, or warns of, at the start of a fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_rejuv.apply_plan import find_copies
from lightning_rejuv.callbacks._averages import check_averages
from lightning_rejuv.callbacks._initial_weights import INIT
from lightning_rejuv.callbacks._module_data import check_module_data
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.callbacks.triggers import AtStart, Trigger
from lightning_rejuv.callbacks.when_metric import WhenMetric
from lightning_rejuv.config import USES_OF_CALIBRATION, Options, alpha_by_name
from lightning_rejuv.make_plan import check_pulls
from lightning_rejuv.neurons import find_decoder
from lightning_rejuv.refit import check_refit
from lightning_rejuv.weights.buffers import check_finite_buffers
from lightning_rejuv.weights.drift import check_finite
from lightning_rejuv.weights.replica import blank
from lightning_rejuv.weights.targets import Targets


def check_arguments(
    anchor: Any, trigger: Trigger, stop_after: bool, name: str | None, calibration: Any, options: Options
) -> None:
    """Refuse, at construction, arguments that do not go together.

    Raises:
        MisconfigurationException: one of them.
    """
    if stop_after and (trigger.repeats or trigger.at_end):
        raise MisconfigurationException(
            f"Expected a moment that comes once and before the end with `stop_after=True` but got "
            f"{type(trigger).__name__}."
        )
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise MisconfigurationException(
            f"Expected argument `name` to be of letters, digits, '_', '.' and '-', since files are named after it, but "
            f"got {name!r}."
        )
    if isinstance(anchor, str) and anchor == INIT and isinstance(trigger, AtStart):
        raise MisconfigurationException(
            'Expected a later moment than `at_start=True` with `anchor="init"`: there the model is its own anchor, and '
            "there is nothing to pull back. Pass the base as `anchor`."
        )
    if calibration is not None and not options.runs_the_model:
        raise MisconfigurationException(
            f"Expected no `calibration` without {USES_OF_CALIBRATION}: it would have no effect. Leave it out, or pass "
            "one of them."
        )
    if isinstance(calibration, Iterator):
        raise MisconfigurationException(
            "Expected argument `calibration` to be batches that can be read more than once, since they are checked at "
            f"the start of the fit, but got a {type(calibration).__name__}. Pass `list(…)` of it, or a DataLoader."
        )


def check_start(
    trainer: Trainer,
    module: LightningModule,
    model: nn.Module,
    targets: Targets,
    calibration: Any,
    options: Options,
    *,
    due_now: bool,
) -> None:
    """Refuse, at the start of the fit, what would fail when the moment comes.

    Args:
        trainer: the Trainer.
        module: the LightningModule.
        model: the language model in it.
        targets: its parameters, matched with the anchor.
        calibration: the callback's batches; None for the module's.
        options: what is wanted.
        due_now: whether the moment has come, and all of the anchor is about to be read anyway.

    Raises:
        MisconfigurationException: data, or a method that brings them, are missing.
        ValueError: the model's family is not known, its data are malformed, a pattern of ``alpha`` and the
            parameters do not fit each other, the anchor is not finite, or an optimizer holds weights that
            cannot be edited.
    """
    find_copies(targets, trainer.optimizers, options)
    if not isinstance(options.alpha, str):
        alpha_by_name(options.alpha, list(targets.fused))
    check_pulls(targets, options)
    check_refit(targets, options)
    if options.runs_the_model and targets.layout.sharded:
        model = blank(model, targets.layout)
    if options.reset is not None:
        find_decoder(model)
    check_module_data(module, model, calibration, options)
    if not due_now:
        check_finite(targets.measure(), targets.description, may_be_equal=True)
        check_finite_buffers(targets.buffers, targets.anchor_of, targets.description)


def check_neighbours(trainer: Trainer, callback: Callback, trigger: Trigger, *, ends_fit: bool) -> None:
    """Check the Trainer's other callbacks.

    Args:
        trainer: the Trainer.
        callback: the callback that rejuvenates.
        trigger: when it does.
        ends_fit: whether the fit ends with it.

    Raises:
        MisconfigurationException: a callback that averages weights would undo the edit.
    """
    check_averages(trainer, callback, ends_fit=ends_fit)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    first = not ends_fit and not trainer.global_step and trigger.due(trainer, trainer.current_epoch)
    if not (first or ends_fit) and any(isinstance(other, EarlyStopping) for other in callbacks):
        rank_zero_warn(
            "The loss rises where a model is rejuvenated and takes a while to come down again; EarlyStopping counts "
            "this as no improvement. Give it enough `patience`, or stop with the rejuvenation: `stop_after=True`."
        )
    if isinstance(trigger, WhenMetric) and trigger.every_n_steps is not None:
        later = callbacks[callbacks.index(callback) :]
        if any(isinstance(other, PlasticityCallback) for other in later):
            rank_zero_warn(
                "PlasticityCallback is listed after RejuvenationCallback, whose looks then see what was measured "
                "before the last time. List PlasticityCallback first."
            )
