"""Everything that the study says, as plain numbers: what tables, sentences and figures are made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from studies.analysis import forecast, thresholds
from studies.analysis.checks import target_checks
from studies.analysis.comparisons import (
    CONFIRMATORY,
    EXPLORATORY,
    FRESH,
    RULES,
    SECOND,
    VARIANTS,
    Comparison,
    compare,
    confirmed,
)
from studies.analysis.results import TaskResults, auc, end, gain, start
from studies.analysis.statistics import SUCCESS, Estimate, mean, success_rate
from studies.arms import EXCESSIVE

DIGITS = 5
SPLITS = ("id", "ood")
# What of its measures the verdict is not shown.
SHOWN: dict[str, tuple[str, ...]] = {
    "whole": (),
    "without zero-variance groups": ("zero_variance_groups",),
}


def summarise(tasks: Mapping[str, TaskResults]) -> dict[str, Any]:
    """Build the summary; every number is rounded, every missing one is null."""
    confirmatory = compare(CONFIRMATORY, tasks, test=True)
    second = compare(SECOND, tasks, test=True, since=FRESH)
    summary: dict[str, Any] = {
        "tasks": {name: _of_task(task) for name, task in tasks.items()},
        "checks": [
            {
                **{key: getattr(check, key) for key in ("ours", "theirs", "task", "split", "strict")},
                **_difference(check.difference),
                "p_holm": check.p_holm,
                "passed": check.passed,
            }
            for check in target_checks(tasks)
        ],
        "confirmatory": _family(confirmatory, confirmed(confirmatory)),
        "second": _family(second, confirmed(second, pooled_tasks=True)),
        "exploratory": [_comparison(found) for found in compare(EXPLORATORY, tasks)],
        "variants": [_comparison(found) for found in compare(VARIANTS, tasks)],
        "rules": [_comparison(found) for found in compare(RULES, tasks)],
        "forecast": {
            side: _forecast(tasks, over_trained_side)
            for side, over_trained_side in (("all", False), ("over_trained", True))
        },
    }
    return _rounded(summary)


def _family(comparisons: Sequence[Comparison], adjusted: Mapping[str, float]) -> list[dict[str, Any]]:
    """Comparisons with their adjusted p-values, where they belong to the family."""
    return [
        {
            **_comparison(found),
            "p_holm": adjusted.get(f"{found.task}: {found.pair.name}") if found.outcome == "id" else None,
        }
        for found in comparisons
    ]


def _of_task(task: TaskResults) -> dict[str, Any]:
    return {
        "title": task.title,
        "moderate": task.moderate,
        "excessive": EXCESSIVE,
        "seeds": list(task.seeds),
        "tuning_seeds": task.tuning,
        "settings": task.settings,
        "tokens_per_response": mean(list(task.tokens.values())).value,
        "versions": task.versions,
        "arms": {arm: _of_arm(task, arm) for arm in task.arms},
    }


def _of_arm(task: TaskResults, arm: str) -> dict[str, Any]:
    records = task.records(arm)
    successes = {split: sum(end(split)(record) >= SUCCESS for record in records.values()) for split in SPLITS}
    alphas = [record["alpha"] for record in records.values() if record["alpha"] is not None]
    scores: dict[str, Any] = {
        split: {
            name: _estimate(mean(list(task.values(arm, of(split)).values())))
            for name, of in (("start", start), ("end", end), ("gain", gain))
        }
        for split in SPLITS
    }
    rates = {
        name: {
            moment: mean([record["id"][moment][name] for record in records.values()]).value
            for moment in ("start", "end")
        }
        for name in ("form_rate", "style_rate", "pass_at_k")
    }
    return {
        "n": len(records),
        **scores,
        "reward_auc": _estimate(mean(list(task.values(arm, auc).values()))),
        "successes": successes["id"],
        "success_rate": _estimate(success_rate(successes["id"], len(records))),
        "successes_ood": successes["ood"],
        **rates,
        "rl_responses": sorted({record["rl_responses"] for record in records.values()}),
        "alpha": {"mean": mean(alphas).value, "low": min(alphas), "high": max(alphas)} if alphas else None,
        "neurons_reset": mean([record["neurons_reset"] for record in records.values()]).value,
        "neurons_total": max(record["neurons_total"] for record in records.values()),
        "resets": _resets(records.values()),
        "measures": _measures(records.values()),
    }


def _resets(records: Sequence[Mapping[str, Any]] | Any) -> dict[str, float]:
    """Share of all reset neurons by ``<layer>.<kind>``, over the seeds together."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record["resets"])
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items())} if total else {}


def _measures(records: Sequence[Mapping[str, Any]] | Any) -> dict[str, float]:
    """Mean of each pre-RL measure over the seeds in which it is defined."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record["measures"].items():
            if value is not None and value == value:
                values.setdefault(name, []).append(value)
    return {name: mean(found).value for name, found in values.items()}


def _forecast(tasks: Mapping[str, TaskResults], over_trained_side: bool) -> dict[str, Any]:
    """Each measure in each task and, pooled, in all of them."""
    found = {name: forecast.starts([task], over_trained_side) for name, task in tasks.items()}
    pooled = [start for group in found.values() for start in group]
    names = forecast.measures_of(pooled)
    if len(found) > 1:
        found["all"] = pooled
    return {name: _forecast_of(group, found, name, names) for name, group in found.items()}


def _forecast_of(
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
            "roc_auc": _estimate(area),
            "roc_auc_held_out": _estimate(forecast.roc_auc(score, measure)),
            "spearman": _estimate(forecast.spearman_within_seed(group, measure)),
            "threshold": _threshold(cut),
            "threshold_in_other_task": _threshold(transferred),
            "bounds": None
            if limits is None
            else {
                "safe": limits.safe,
                "lost": limits.lost,
                **{
                    part: _estimate(getattr(limits, part)) for part in ("above_safe", "between", "below_lost")
                },
            },
        }
    return {
        "starts": len(group),
        "successes": sum(start.success for start in group),
        "seeds": len({start.cluster for start in group}),
        "measures": rows,
        "levels": {
            shown: {level: _estimate(rate) for level, rate in thresholds.levels(group, without).items()}
            for shown, without in SHOWN.items()
        },
        "verdict": {
            "above -4": _estimate(thresholds.rate_in(group, "support", -4.0, float("inf"))),
            "-8 to -4": _estimate(thresholds.rate_in(group, "support", -8.0, -4.0)),
            "below -8": _estimate(thresholds.rate_in(group, "support", -float("inf"), -8.0)),
        },
    }


def _threshold(cut: thresholds.Threshold | None) -> dict[str, Any] | None:
    return None if cut is None else {**cut._asdict(), "balanced_accuracy": cut.balanced_accuracy}


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate._asdict()


def _comparison(found: Comparison) -> dict[str, Any]:
    pair = found.pair
    return {
        "ours": pair.ours,
        "theirs": pair.theirs,
        "question": pair.question,
        "task": found.task,
        "outcome": found.outcome,
        **_difference(found.difference),
    }


def _difference(difference: Any) -> dict[str, Any]:
    return {
        **difference.estimate._asdict(),
        "wins": difference.wins,
        "losses": difference.losses,
        "p": difference.p,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value
