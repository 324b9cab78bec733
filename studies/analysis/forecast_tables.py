"""The tables of the pages of evidence about what can be told before RL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.analysis.markdown import interval, listed, number, plus_minus, table
from studies.analysis.tables import Summary
from studies.verdicts import confusion_table

SIDES = {"all": "all starts", "over_trained": "the over-trained side"}
MEASURES = 10  # of the tables of thresholds
RATE = ("above_safe", "between", "below_lost")


def forecast_blocks(summary: Summary) -> dict[str, str]:
    """Tables by the name of their place in the page."""
    return {
        **{f"forecast {side}": forecast_table(summary, side) for side in SIDES},
        "thresholds": thresholds_table(summary, "over_trained"),
        "bounds": bounds_table(summary),
        **{f"verdict {side}": verdict_table(summary, side) for side in summary["verdict"]},
    }


def titles(summary: Summary) -> dict[str, str]:
    """Tasks in words, and both."""
    return {**{name: task["title"] for name, task in summary["tasks"].items()}, "all": "both tasks"}


def ranked(summary: Summary, side: str) -> list[str]:
    """Measures, the best forecast first: by the distance of the held-out seeds' mean ROC-AUC from one half."""
    by_task = summary["forecast"][side]

    def quality(measure: str) -> float:
        areas = [
            held_out["value"]
            for name in summary["tasks"]
            if (held_out := by_task[name]["measures"].get(measure, {}).get("roc_auc_held_out")) is not None
        ]
        return abs(sum(areas) / len(areas) - 0.5) if areas else -1.0

    names = dict.fromkeys(measure for found in by_task.values() for measure in found["measures"])
    return sorted(names, key=quality, reverse=True)


def turned_areas(summary: Summary, side: str, measure: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """A measure's ROC-AUCs on held-out seeds by task, turned so that above one half is better than a guess.

    It is turned in all tasks or in none, by the mean over tasks.

    Returns:
        Areas with their intervals, and whether they are turned: whether smaller values go with success.
    """
    rows = {
        name: row
        for name in summary["tasks"]
        if (row := summary["forecast"][side][name]["measures"].get(measure, {}).get("roc_auc_held_out"))
    }
    reverse = sum(row["value"] for row in rows.values()) < len(rows) / 2
    return {name: _turned(row) if reverse else row for name, row in rows.items()}, reverse


def areas(summary: Summary, side: str, measure: str) -> str:
    """A measure's `turned_areas` in words."""
    rows, reverse = turned_areas(summary, side, measure)
    if not rows:
        return ""
    texts = [f"{interval(row)} ({summary['tasks'][name]['title'].lower()})" for name, row in rows.items()]
    return f"`{measure}`{' (the smaller the better)' * reverse} {listed(texts)}"


def _turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """The area of the negated measure."""
    low, high = (None if row[bound] is None else 1 - row[bound] for bound in ("high", "low"))
    return {"value": 1 - row["value"], "low": low, "high": high}


def forecast_table(summary: Summary, side: str) -> str:
    """Every measure: rank correlation with the end point within a seed, and ROC-AUC for success."""
    by_task, names = summary["forecast"][side], titles(summary)
    header = ["measure before RL"]
    for name in by_task:
        header += [] if name == "all" else [f"{names[name]}: Spearman within seed"]
        header.append(f"{names[name]}: ROC-AUC, held-out seeds")
    rows = []
    for measure in ranked(summary, side):
        cells = []
        for name, found in by_task.items():
            row = found["measures"].get(measure, {})
            cells += [] if name == "all" else [plus_minus(row.get("spearman"))]
            cells.append(interval(row.get("roc_auc_held_out")))
        rows.append([f"`{measure}`", *cells])
    return table(header, rows)


def thresholds_table(summary: Summary, side: str) -> str:
    """The best cut of each measure on the even seeds, and its accuracy on the odd ones and in the other task."""
    by_task, names = summary["forecast"][side], titles(summary)
    several = len(summary["tasks"]) > 1
    header = ["measure before RL"]
    for name in by_task:
        header += [f"{names[name]}: success if", "held out"]
        header += ["other task"] if several and name != "all" else []
    rows = []
    for measure in ranked(summary, side)[:MEASURES]:
        cells = []
        for name, found in by_task.items():
            row = found["measures"].get(measure, {})
            cells += _cut(row.get("threshold"))
            if several and name != "all":
                cells.append(_cut(row.get("threshold_in_other_task"))[1])
        rows.append([f"`{measure}`", *cells])
    return table(header, rows)


def _cut(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return [number(None), number(None)]
    side = "≥" if row["larger_is_better"] else "≤"
    return [f"{side} {number(row['value'], 3)}", number(row["balanced_accuracy"])]


def bounds_table(summary: Summary, measures: int = 3) -> str:
    """Two thresholds of the measures that rank highest on the over-trained side."""
    by_task, names = summary["forecast"]["over_trained"], titles(summary)
    header = [
        "measure",
        "task",
        "95% succeed from",
        "5% succeed below",
        "held out: above",
        "between",
        "below",
    ]
    rows: list[list[str]] = []
    for measure in ranked(summary, "over_trained"):
        found = [(name, row["measures"].get(measure, {}).get("bounds")) for name, row in by_task.items()]
        if not any(limits for _, limits in found) or len(rows) >= measures * len(by_task):
            continue
        for name, limits in found:
            if limits is not None:
                rates = [_rate(limits[part]) for part in RATE]
                rows.append(
                    [
                        f"`{measure}`",
                        names[name],
                        number(limits["safe"], 3),
                        number(limits["lost"], 3),
                        *rates,
                    ]
                )
    return table(header, rows)


def verdict_table(summary: Summary, side: str) -> str:
    """Levels of the library's verdict by what became of the starts."""
    names = titles(summary)
    return confusion_table({names[name]: found for name, found in summary["verdict"][side].items()})


def sparse(summary: Summary, side: str, measures: Sequence[str]) -> str:
    """Which measures some starts lack, so that their figures are of fewer starts than the others'."""
    found = summary["forecast"][side].values()
    total = sum(of_task["starts"] for of_task in found)
    lacking = []
    for measure in measures:
        n = sum(row["roc_auc"]["n"] for of_task in found if (row := of_task["measures"].get(measure)))
        if n < total:
            lacking.append(f"`{measure}`")
    return f" Fewer starts have {listed(lacking)}." if lacking else ""


def _rate(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "no start"
    return f"{round(row['value'] * row['n'])}/{row['n']}, {interval(row)}"
