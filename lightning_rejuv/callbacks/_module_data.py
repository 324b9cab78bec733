"""The data that a LightningModule brings along for its rejuvenation."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.config import Options
from lightning_rejuv.make_plan import Data


def module_data(module: LightningModule, calibration: Any, options: Options) -> Data:
    """Collect what a module's methods and the callback's argument bring.

    Args:
        module: the module, with ``calibration_dataloader``, ``sample_responses`` or ``verify_responses``.
        calibration: the callback's; None for the module's.
        options: what is wanted; calibration data are asked for only where they are needed.

    Raises:
        MisconfigurationException: calibration data are needed, and there are none.
    """
    return Data(
        calibration=_calibration_of(module, calibration, options) if options.runs_the_model else None,
        sampler=getattr(module, "sample_responses", None),
        verifier=getattr(module, "verify_responses", None),
    )


def check_module_data(module: LightningModule, model: nn.Module, calibration: Any, options: Options) -> None:
    """Refuse missing or malformed data before any training is done.

    Args:
        module: the module.
        model: the language model in it.
        calibration: the callback's batches; None for the module's.
        options: what is wanted.

    Raises:
        MisconfigurationException: data or a method that brings them are missing.
        ValueError: a calibration batch is malformed or does not fit the model.
    """
    data = module_data(module, calibration, options)
    if data.calibration is not None:
        batches_for(model, data.calibration)
    if not options.searches_alpha and options.refit is None:
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
