"""Tables and sentences about what a measure says within one recipe, in the study and on a real model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.analysis.forecast_tables import titles
from studies.analysis.markdown import NONE, interval, listed, number, table
from studies.analysis.tables import Summary

#: Named in the sentences beside the best: what the page speaks of.
REFERENCES = ("support", "style_rate", "base_style_rate", "base_solved", "relative_drift", "alpha")


def within_blocks(summary: Summary) -> dict[str, str]:
    """Tables and sentences by the name of their place in the page."""
    made = {"forecast within": within_table(summary), "findings within": within_findings(summary)}
    found = summary.get("real_forecast")
    return {**made, "forecast real": real_table(found)} if found else made


def within_table(summary: Summary) -> str:
    """ROC-AUCs over all starts, and over the pairs of one arm, which differ in their seeds alone."""
    by_task, names = summary["forecast_within"], titles(summary)
    header = ["measure before RL"]
    for name in by_task:
        header += [f"{names[name]}: over all starts", "n", "within an arm", "pairs (arms)"]

    def quality(measure: str) -> float:
        return _distance([found["measures"].get(measure, {}).get("within") for found in by_task.values()])

    every = dict.fromkeys(measure for found in by_task.values() for measure in found["measures"])
    rows = []
    for measure in sorted(every, key=quality, reverse=True):
        cells = []
        for found in by_task.values():
            row = found["measures"].get(measure, {})
            cells += [
                interval(row.get("all")),
                str(row["all"]["n"]) if row else NONE,
                *_within(row.get("within")),
            ]
        rows.append([f"`{measure}`", *cells])
    return table(header, rows)


def within_findings(summary: Summary, best: int = 2) -> str:
    """In words: within an arm, the measures furthest from one half, then the references; a line for each task."""
    lines = []
    for name, found in summary["forecast_within"].items():
        rows = {measure: row for measure, row in found["measures"].items() if row["within"]}
        if not rows:
            continue
        ordered = sorted(rows, key=lambda measure: _distance([rows[measure]["within"]]), reverse=True)
        shown = dict.fromkeys([*ordered[:best], *(measure for measure in REFERENCES if measure in rows)])
        counted = max((row["within"] for row in rows.values()), key=lambda row: row["pairs"])
        areas_of = [
            f"`{measure}` {interval(rows[measure]['within'])} (over all starts {number(rows[measure]['all']['value'])})"
            for measure in shown
        ]
        lines.append(
            f"- {titles(summary)[name]}, ROC-AUC over {counted['pairs']} pairs of a success and a failure of one arm "
            f"({counted['strata']} arms have both): {listed(areas_of)}."
        )
    return "\n".join(lines)


def real_table(found: Mapping[str, Any]) -> str:
    """ROC-AUCs on a real model: over all starts, over pairs of one recipe, and of one arm of one recipe."""
    header = ["measure before RL", "n", "over all starts"]
    header += ["within a recipe", "pairs (recipes)", "within an arm", "pairs (arms)"]
    measures = found["measures"]
    ordered = sorted(measures, key=lambda name: _distance([measures[name]["recipe"]]), reverse=True)
    return table(
        header,
        [
            [
                f"`{name}`",
                str(measures[name]["all"]["n"]),
                interval(measures[name]["all"]),
                *_within(measures[name]["recipe"]),
                *_within(measures[name]["arm"]),
            ]
            for name in ordered
        ],
    )


def _within(row: Mapping[str, Any] | None) -> list[str]:
    return [interval(row), f"{row['pairs']} ({row['strata']})" if row else NONE]


def _distance(rows: Sequence[Mapping[str, Any] | None]) -> float:
    """How far the mean of areas lies from one half; those that are not there count as one half."""
    values = [row["value"] for row in rows if row is not None]
    return abs(sum(values) / len(values) - 0.5) if values else -1.0
