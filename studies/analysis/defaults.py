"""The library's defaults, and the study's own rule for alpha, beside what its comparisons say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_rejuv.config import Options, Reset
from studies.analysis.markdown import number, table
from studies.arms import ARMS

Row = Mapping[str, Any]
RESET = Reset()
_TARGET = ARMS["auto_nll_100"].options["alpha_target"]
_SHARE = f"{ARMS['auto_reset_entropy'].reset_fraction:g}"


class Setting(NamedTuple):
    """One default, and the arms that differ from the default's arm in this setting alone."""

    name: str
    value: str
    arms: tuple[str, ...]
    against: str
    section: str


def _ranking() -> str:
    return "signed (of the entropy gradient)" if RESET.rank_by is None else RESET.rank_by


def _automatic(name: str, value: str, *arms: str) -> Setting:
    return Setting(name, value, arms, "auto_nll_100", "Automatic alpha")


def _rigid(name: str, value: str, *arms: str) -> Setting:
    return Setting(name, value, arms, "rigid_entropy", "The reset")


SETTINGS = (
    _automatic("target of the study's rule for alpha", f"{_TARGET:g} nat", "auto_nll_60", "auto_nll_150"),
    _automatic("the study's rule for alpha", "excess NLL", "auto_support", "auto_kl", "auto_entropy"),
    _automatic("the same, against a number", "excess NLL", "fusion_30", "fusion_40", "fusion_50"),
    Setting(
        "a reset at all",
        "a reset" if Options().reset else "none",
        ("auto_reset_entropy",),
        "auto_nll_100",
        "The reset",
    ),
    Setting(
        "`fraction` of a `Reset`",
        _SHARE,
        ("auto_reset_entropy_4",),
        "auto_reset_entropy",
        "The reset",
    ),
    _rigid(
        "the same, alpha too large, against 0.04",
        _SHARE,
        "rigid_entropy_05",
        "rigid_entropy_1",
        "rigid_entropy_2",
        "rigid_entropy_8",
    ),
    Setting("`quantity`", RESET.quantity, ("auto_reset",), "auto_reset_entropy", "The reset"),
    _rigid("the same, alpha too large", RESET.quantity, "rigid_reset"),
    _rigid("`rank_by`", _ranking(), "rigid_entropy_absolute"),
    _rigid("`positions`", RESET.positions, "rigid_entropy_gap"),
    _rigid("`positions_per_response`", f"{RESET.positions_per_response}", "rigid_entropy_positions_2"),
    _rigid("`scope`", RESET.scope, "rigid_entropy_layer", "rigid_entropy_module"),
)


def defaults_table(summary: Mapping[str, Any]) -> str:
    """Each default, the alternatives that were run, and which of them differ over both tasks."""
    lines = [
        [
            setting.name,
            setting.value,
            f"`{setting.against}`",
            *_told_apart([_row(summary, arm, setting.against) for arm in setting.arms], setting.arms),
            setting.section,
        ]
        for setting in SETTINGS
    ]
    header = ["setting", "default", "alternatives minus", "above it", "below it", "not told apart", "table"]
    return table(header, lines)


def _row(summary: Mapping[str, Any], ours: str, theirs: str) -> Row | None:
    """`ours` minus `theirs` in distribution, over both tasks or the one there is, whichever way round it is kept."""
    rows = [
        row
        for key in ("rules", "variants", "exploratory")
        for row in summary[key]
        if row["outcome"] == "id" and {row["ours"], row["theirs"]} == {ours, theirs}
    ]
    if not rows:
        return None
    found = next((row for row in rows if row["task"] == "all"), rows[0])
    if found["ours"] == ours:
        return found
    low, high = (None if found[bound] is None else -found[bound] for bound in ("high", "low"))
    return {**found, "ours": ours, "theirs": theirs, "value": -found["value"], "low": low, "high": high}


def _told_apart(rows: Sequence[Row | None], arms: Sequence[str]) -> list[str]:
    """Alternatives whose interval lies above 0, below 0, or neither."""
    above: list[str] = []
    below: list[str] = []
    open_: list[str] = []
    for arm, row in zip(arms, rows, strict=True):
        if row is None:
            open_.append(f"`{arm}` not run")
            continue
        known = row["low"] is not None
        (above if known and row["low"] > 0 else below if known and row["high"] < 0 else open_).append(
            f"`{arm}` {number(row['value'], sign=True)}"
        )
    return [", ".join(texts) or "none" for texts in (above, below, open_)]
