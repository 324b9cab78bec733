"""What a RejuvenationCallback refuses, or warns of, before anything is trained; and the data that it asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_rejuv._compat import callbacks_of
from lightning_rejuv.apply_plan import find_copies
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.callbacks.triggers import AtStart, Trigger
from lightning_rejuv.callbacks.when_metric import WhenMetric
from lightning_rejuv.config import USES_OF_CALIBRATION, Options, alpha_by_name
from lightning_rejuv.data import Data
from lightning_rejuv.make_plan import check_dora
from lightning_rejuv.metrics._base import is_init
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
            "Expected a moment that comes once and before the end with `stop_after=True` but got "
            f"{type(trigger).__name__}."
        )
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise MisconfigurationException(
            "Expected argument `name` to be of letters, digits, '_', '.' and '-', since files are named after it, but "
            f"got {name!r}."
        )
    if is_init(anchor) and isinstance(trigger, AtStart):
        raise MisconfigurationException(
            'Expected a later moment than `at_start=True` with `anchor="init"`: at the start the model is its own '
            "anchor, and there is nothing to pull back. Pass the base as `anchor`."
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
    check_dora(targets, options)
    check_refit(targets, options)
    if options.runs_the_model and targets.layout.sharded:
        model = blank(model, targets.layout)
    if options.reset is not None:
        find_decoder(model)
    _check_data(module, model, calibration, options)
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
        MisconfigurationException: a callback would bring the weights before the rejuvenation back:
            ``StochasticWeightAveraging``, or one that puts its average into the model only after it has been
            rejuvenated.
    """
    callbacks = callbacks_of(trainer)
    own = callbacks.index(callback)
    for number, other in enumerate(callbacks):
        kind = type(other).__name__
        if isinstance(other, StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{kind} keeps an average of the weights, which would bring the weights before the rejuvenation back. "
                f"Do without {kind} in this fit and use it in the next, or use `EMAWeightAveraging`, whose average is "
                "rejuvenated as well."
            )
        if ends_fit and isinstance(other, WeightAveraging) and number > own:
            raise MisconfigurationException(
                f"Expected {kind} before {type(callback).__name__} in the Trainer's callbacks: at the end of the fit "
                "it puts its average into the model, and this is what is to be rejuvenated. List it first."
            )
    first = not ends_fit and not trainer.global_step and trigger.due(trainer, trainer.current_epoch)
    if not (first or ends_fit) and any(isinstance(other, EarlyStopping) for other in callbacks):
        rank_zero_warn(
            "The loss rises when a model is rejuvenated and takes a while to come down again; EarlyStopping counts "
            "this as no improvement. Give it enough `patience`, or stop with the rejuvenation: `stop_after=True`."
        )
    looks = isinstance(trigger, WhenMetric) and trigger.every_n_steps is not None
    if looks and any(isinstance(other, PlasticityCallback) for other in callbacks[own:]):
        rank_zero_warn(
            "PlasticityCallback is listed after RejuvenationCallback, whose looks then see what was measured before "
            "the last time. List PlasticityCallback first."
        )


def module_data(module: LightningModule, calibration: Any, options: Options) -> Data:
    """Collect what a module's methods and the callback's argument bring.

    Args:
        module: the module, with ``calibration_dataloader``, ``sample_responses`` or ``verify_responses``.
        calibration: the callback's; None for the module's.
        options: what is wanted; calibration data are asked for only if they are needed.

    Raises:
        MisconfigurationException: calibration data are needed, and there are none.
    """
    return Data(
        calibration=_calibration_of(module, calibration, options) if options.runs_the_model else None,
        sampler=getattr(module, "sample_responses", None),
        verifier=getattr(module, "verify_responses", None),
    )


def _check_data(module: LightningModule, model: nn.Module, calibration: Any, options: Options) -> None:
    """Refuse data that are missing or malformed; see :func:`check_start`."""
    data = module_data(module, calibration, options)
    if data.calibration is not None:
        batches_for(model, data.calibration)
    if not options.samples_the_base:
        return
    if data.sampler is None and not hasattr(model, "generate"):
        needs, instead = "`refit`", "leave `refit` out"
        if options.searches_alpha:
            needs, instead = f"`alpha={options.alpha!r}`", "set `alpha` to a number"
        raise MisconfigurationException(
            f"{needs} needs responses that the anchor samples, and {type(model).__name__} has no `generate`: give "
            f"{type(module).__name__} a method `sample_responses(model)` that returns them as batches, or {instead}."
        )


def _calibration_of(module: LightningModule, calibration: Any, options: Options) -> Any:
    if calibration is not None:
        return calibration
    loader = getattr(module, "calibration_dataloader", None)
    if loader is None:
        raise MisconfigurationException(
            options.without_calibration(
                f"Give {type(module).__name__} a `calibration_dataloader()` that returns batches, or pass "
                "`calibration=<batches>`"
            )
        )
    return loader()
