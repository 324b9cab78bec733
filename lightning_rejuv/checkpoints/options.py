"""Which options a rejuvenation from disk to disk takes, and which of them have an effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lightning_rejuv.checkpoints.device import check_compute_dtype, check_device
from lightning_rejuv.checkpoints.stream import DTYPES
from lightning_rejuv.config import USES_OF_CALIBRATION, Options
from lightning_rejuv.weights.rounding import HALF_TYPES

# What only a model that is run has, with the defaults.
_OF_MODELS: Mapping[str, Any] = {"calibration": None, "device": "cpu", "compute_dtype": "auto"}


def check_options(asked: Options, beside: Mapping[str, Any]) -> None:
    """Refuse what cannot be meant, before a file is opened.

    Args:
        asked: the options of the method.
        beside: ``calibration``, ``device``, ``dtype`` and ``compute_dtype``.

    Raises:
        ValueError: one is out of range, has no effect beside the others, or is missing; or the device is not there.
    """
    check_compute_dtype(beside["compute_dtype"])
    if beside["dtype"] is not None and beside["dtype"] not in DTYPES:
        raise ValueError(
            f"Expected argument `dtype` to be one of {sorted(DTYPES)} but got {beside['dtype']!r}."
        )
    if not asked.runs_the_model:
        _refuse_idle(
            _given_of_models(beside),
            "with a number for `alpha`, no reset and no refit",
            f"pass {USES_OF_CALIBRATION}",
        )
    if asked.runs_the_model and beside["calibration"] is None:
        raise ValueError(
            asked.without_calibration(
                "Pass as `calibration` a JSONL file with prompts and responses as in SFT"
            )
        )
    if asked.refit is not None and beside["compute_dtype"] == "float16":
        raise ValueError(
            'Expected `compute_dtype` to be "float32" or "bfloat16" with `refit` but got "float16", whose gradients '
            "underflow."
        )
    if asked.runs_the_model:
        check_device(beside["device"])


def check_no_model_is_run(beside: Mapping[str, Any]) -> None:
    """Refuse, of a diagnosis without calibration data, what says how a model is run.

    Args:
        beside: ``device`` and ``compute_dtype``.

    Raises:
        ValueError: one was given.

    >>> check_no_model_is_run({"device": "cuda", "compute_dtype": "auto"})
    Traceback (most recent call last):
    ...
    ValueError: Expected no `device` without `calibration`: it would have no effect. Leave it out, or pass ...
    """
    _refuse_idle(_given_of_models(beside), "without `calibration`", "pass `calibration`")


def _given_of_models(beside: Mapping[str, Any]) -> list[str]:
    return [name for name, usual in _OF_MODELS.items() if name in beside and beside[name] != usual]


def _refuse_idle(names: Sequence[str], beside: str, instead: str) -> None:
    if names:
        listed = ", ".join(f"`{name}`" for name in names)
        raise ValueError(
            f"Expected no {listed} {beside}: it would have no effect. Leave it out, or {instead}."
        )


def check_seed(asked: Options, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse a seed that nothing would be drawn with.

    Args:
        asked: the options of the method.
        dtypes: of the output's tensors.

    Raises:
        ValueError: no model is run, and no tensor is rounded stochastically.
    """
    found = set(dtypes)
    drawn = asked.rounding == "stochastic" and not HALF_TYPES.isdisjoint(found)
    if asked.seed and not asked.runs_the_model and not drawn:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ValueError(
            f'Expected no `seed` with `rounding="{asked.rounding}"` to {names}: nothing is drawn at random, it would '
            "have no effect. Leave it out."
        )


def applied(asked: Options, beside: Mapping[str, Any], dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """Return the options as the report has them: None for what nothing was done with.

    Args:
        asked: the options of the method.
        beside: as in :func:`check_options`.
        dtypes: of the output's tensors.
    """
    options = {**asdict(asked), **beside, "calibration": str(beside["calibration"])}
    del options["optimizer_state"]  # a checkpoint on disk has none
    models = () if asked.runs_the_model else ("calibration", "device", "compute_dtype")
    exact = ("rounding",) if HALF_TYPES.isdisjoint(dtypes) else ()
    return {**options, **dict.fromkeys((*models, *exact))}
