"""What can be told before RL, as plain numbers: measures, cuts, and the library's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies import verdicts
from studies.analysis import forecast, thresholds
from studies.analysis.results import TaskResults
from studies.analysis.statistics import plain


def forecast_of(tasks: Mapping[str, TaskResults], over_trained_side: bool) -> dict[str, Any]:
    """Each measure in each task and, pooled, in all of them."""
    found = {name: forecast.starts(members, over_trained_side) for name, members in _scopes(tasks).items()}
    names = forecast.measures_of([start for group in found.values() for start in group])
    return {name: _of_scope(group, found, name, names) for name, group in found.items()}


def _scopes(tasks: Mapping[str, TaskResults]) -> dict[str, list[TaskResults]]:
    """Each task by itself and, where there are several, all of them."""
    found = {name: [task] for name, task in tasks.items()}
    return {**found, "all": list(tasks.values())} if len(tasks) > 1 else found


def _of_scope(
    group: Sequence[forecast.Start],
    by_task: Mapping[str, Sequence[forecast.Start]],
    name: str,
    measures: Sequence[str],
) -> dict[str, Any]:
    choose, score = thresholds.halves(group)
    others = [start for other, starts in by_task.items() if other not in (name, "all") for start in starts]
    rows = {}
    for measure in measures:
        area = forecast.roc_auc(group, measure)
        if area is None:
            continue
        cut = thresholds.threshold(choose, score, measure)
        transferred = None if name == "all" else thresholds.threshold(group, others, measure)
        limits = thresholds.bounds(choose, score, measure) if area.value >= 0.5 else None
        rows[measure] = {
            "roc_auc": plain(area),
            "roc_auc_held_out": plain(forecast.roc_auc(score, measure)),
            "spearman": plain(forecast.spearman_within_seed(group, measure)),
            "threshold": _threshold(cut),
            "threshold_in_other_task": _threshold(transferred),
            "bounds": None
            if limits is None
            else {
                "safe": limits.safe,
                "lost": limits.lost,
                **{part: plain(getattr(limits, part)) for part in ("above_safe", "between", "below_lost")},
            },
        }
    return {
        **forecast.counts(group),
        "measures": rows,
    }


def verdict_of(tasks: Mapping[str, TaskResults]) -> dict[str, Any]:
    """How many starts of each level of the library's verdict succeeded, and how many failed, by task."""
    found: dict[str, Any] = {side: {} for side in ("all", "without_rollouts")}
    for name, members in _scopes(tasks).items():
        every = forecast.starts(members)
        found["all"][name] = verdicts.confusion(map(verdicts.of_start, every))
        alone = (verdicts.of_start(start, rollouts=False) for start in every)
        found["without_rollouts"][name] = verdicts.confusion(alone)
    return found


def _threshold(cut: thresholds.Threshold | None) -> dict[str, Any] | None:
    return None if cut is None else {**cut._asdict(), "balanced_accuracy": cut.balanced_accuracy}
