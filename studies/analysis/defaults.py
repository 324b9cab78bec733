"""The library's defaults beside what the study's comparisons say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_rejuv.alpha import default_target
from lightning_rejuv.metrics.verdict import RETENTION_AT_RISK, RETENTION_COLLAPSED
from lightning_rejuv.options import Options
from studies.analysis.markdown import NONE, number, table

Row = Mapping[str, Any]
OPTIONS = Options()


class Setting(NamedTuple):
    """One default and the arms that differ from it in this setting alone."""

    name: str
    value: str
    arms: tuple[str, ...]
    against: str
    section: str


SETTINGS = (
    Setting(
        'target of `alpha="auto"`',
        f"{default_target('auto', 20):g} nat",
        ("auto_nll_40", "auto_nll_60", "auto_nll_150"),
        "auto_nll_100",
        "Automatic alpha",
    ),
    Setting(
        'rule of `alpha="auto"`',
        "excess NLL",
        ("auto_support", "auto_kl", "auto_entropy"),
        "auto_nll_100",
        "Automatic alpha",
    ),
    Setting(
        "`alpha` as a number",
        f"{OPTIONS.alpha}",
        ("fusion_30", "fusion_40", "fusion_50"),
        "auto_nll_100",
        "Automatic alpha",
    ),
    Setting(
        "a reset after the automatic alpha",
        f"`reset_fraction` {OPTIONS.reset_fraction}",
        ("auto_reset", "auto_reset_entropy"),
        "auto_nll_100",
        "Automatic alpha",
    ),
    Setting("`positions`", OPTIONS.positions, ("rigid_entropy_gap",), "rigid_reset", "The reset"),
    Setting(
        "`positions_per_response`",
        f"{OPTIONS.positions_per_response}",
        ("rigid_positions_2",),
        "rigid_reset",
        "The reset",
    ),
    Setting("`quantity`", OPTIONS.quantity, ("rigid_entropy",), "rigid_reset", "The reset"),
    Setting("`rank_by`", OPTIONS.rank_by, ("rigid_signed",), "rigid_reset", "The reset"),
    Setting("`scope`", OPTIONS.scope, ("rigid_layer", "rigid_module"), "rigid_reset", "The reset"),
    Setting(
        "`reset_fraction`",
        f"{OPTIONS.reset_fraction}",
        ("rigid_reset_05", "rigid_reset_1", "rigid_reset_2", "rigid_reset_8"),
        "rigid_reset",
        "The reset",
    ),
)


def defaults_table(summary: Mapping[str, Any]) -> str:
    """Each default, the alternatives that were run, and which of them differ over both tasks."""
    rows = [*summary["rules"], *summary["variants"]]
    lines = [
        [
            setting.name,
            setting.value,
            f"`{setting.against}`",
            *_told_apart([row for row in rows if _belongs(row, setting)], setting.arms),
            setting.section,
        ]
        for setting in SETTINGS
    ]
    header = ["setting", "default", "alternatives minus", "above it", "below it", "not told apart", "table"]
    kept = f"at risk < {number(RETENTION_AT_RISK, 0)}, collapsed < {number(RETENTION_COLLAPSED, 0)} nats"
    lines.append(["verdict's limits of support", kept, NONE, NONE, NONE, NONE, "Forecast"])
    return table(header, lines)


def _belongs(row: Row, setting: Setting) -> bool:
    return row["ours"] in setting.arms and row["theirs"] == setting.against and row["outcome"] == "id"


def _told_apart(rows: Sequence[Row], arms: Sequence[str]) -> list[str]:
    """Alternatives whose pooled interval lies above 0, below 0, or neither; of one task where there is one."""
    pooled = [row for row in rows if row["task"] == "all"] or list(rows)
    above, below, open_ = [], [], []
    for row in pooled:
        text = f"`{row['ours']}` {number(row['value'], sign=True)}"
        known = row["low"] is not None
        (above if known and row["low"] > 0 else below if known and row["high"] < 0 else open_).append(text)
    open_ += [f"`{arm}` not run" for arm in arms if arm not in {row["ours"] for row in pooled}]
    return [", ".join(texts) or "none" for texts in (above, below, open_)]
