"""Which options a rejuvenation from disk to disk takes, and which of them have an effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_rejuv.handoff.device import check_compute_dtype, check_device
from lightning_rejuv.handoff.stream import DTYPES
from lightning_rejuv.options import Options

# The options that only the reset has.
_OF_THE_RESET = ("omega", "positions", "positions_per_response", "quantity", "rank_by", "scope", "budget")


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
    if asked.alpha == "support_retention":
        raise ValueError(
            'Expected `alpha` to be a rule that needs no verifier but got "support_retention". Use "auto", or '
            "`lightning_rejuv.rejuvenate` on models in memory."
        )
    usual = Options()
    idle = []
    if not asked.reset_fraction:
        idle = [name for name in _OF_THE_RESET if getattr(asked, name) != getattr(usual, name)]
    if not asked.runs_the_model:
        plain = {"calibration": None, "device": "cpu", "compute_dtype": "auto"}
        idle += [name for name, value in plain.items() if beside[name] != value]
        idle += ["seed"] if asked.seed and asked.rounding == "nearest" else []
    if idle:
        alone = "" if asked.searches_alpha else " and a number for `alpha`"
        raise ValueError(
            f"Expected no {', '.join(f'`{name}`' for name in idle)} with `reset_fraction=0`{alone}: it would have no "
            "effect. Leave it out, or pass a `reset_fraction` above 0."
        )
    if asked.runs_the_model and beside["calibration"] is None:
        raise ValueError(
            f"Expected calibration data for the reset and for `alpha='auto'` but got none, with "
            f"reset_fraction={asked.reset_fraction:g} and alpha={asked.alpha!r}. Pass a JSONL file with prompts and "
            "responses as in SFT, or set `reset_fraction=0` and a number for `alpha` (`--reset-fraction 0 --alpha "
            "0.4`) for fusion alone."
        )
    if asked.runs_the_model:
        check_device(beside["device"])


def applied(asked: Options, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as the report has them: None for what nothing was done with."""
    options = {**vars(asked), **beside, "calibration": str(beside["calibration"])}
    del options["optimizer_state"]  # a checkpoint on disk has none
    idle = () if asked.reset_fraction else _OF_THE_RESET
    models = () if asked.runs_the_model else ("calibration", "device", "compute_dtype")
    return {**options, **dict.fromkeys((*idle, *models))}
