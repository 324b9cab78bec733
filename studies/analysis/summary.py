"""Everything that the study says, as plain numbers: what tables, sentences and figures are made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.analysis.checks import DEFAULT, target_checks
from studies.analysis.comparisons import (
    CONFIRMATORY,
    EXPLORATORY,
    RULES,
    SECOND,
    THIRD,
    VARIANTS,
    Comparison,
    Family,
    compare,
    confirmed,
)
from studies.analysis.forecast_summary import forecast_of, verdict_of
from studies.analysis.landscape import landscape_of
from studies.analysis.real_forecast import real_forecast_of
from studies.analysis.results import TaskResults, auc, end, gain, start, succeeded, unfinished
from studies.analysis.statistics import SUCCESS, mean, plain, success_rate
from studies.analysis.within_recipe import within_of
from studies.arms import EXCESSIVE, SECOND_SEEDS

DIGITS = 5
SPLITS = ("id", "ood")
# Arms whose ends on the second set of seeds are shown by themselves, beside moderate SFT.
FRESHLY = (DEFAULT, "auto_nll_100", EXCESSIVE, "fusion_40")


def summarise(tasks: Mapping[str, TaskResults], results: Path | None = None) -> dict[str, Any]:
    """Build the summary; every number is rounded, every missing one is null.

    Args:
        tasks: The results of the study.
        results: docs/results, for what other results the page shows; without it they are left out.
    """
    confirmatory = compare(CONFIRMATORY, tasks, test=True)
    summary: dict[str, Any] = {
        "tasks": {name: _of_task(task) for name, task in tasks.items()},
        "checks": [
            {
                **{
                    key: getattr(check, key) for key in ("ours", "theirs", "task", "split", "strict", "fresh")
                },
                **_difference(check.difference),
                "p_holm": check.p_holm,
                "passed": check.passed,
            }
            for check in target_checks(tasks)
        ],
        "confirmatory": _adjusted(confirmatory, confirmed(confirmatory)),
        "second": _family(SECOND, tasks),
        "third": _family(THIRD, tasks),
        "exploratory": [_comparison(found) for found in compare(EXPLORATORY, tasks)],
        "variants": [_comparison(found) for found in compare(VARIANTS, tasks)],
        "rules": [_comparison(found) for found in compare(RULES, tasks)],
        "forecast": {
            side: forecast_of(tasks, over_trained_side)
            for side, over_trained_side in (("all", False), ("over_trained", True))
        },
        "forecast_within": within_of(tasks),
        "verdict": verdict_of(tasks),
    }
    if results is not None:
        summary |= {"real_forecast": real_forecast_of(results), "landscape": landscape_of(results, tasks)}
    return _rounded(summary)


def _family(family: Family, tasks: Mapping[str, TaskResults]) -> list[dict[str, Any]]:
    """A family that is tested on both tasks pooled, on its own seeds."""
    found = compare(family.pairs, tasks, test=True, seeds=family.seeds)
    return _adjusted(found, confirmed(found, pooled_tasks=True))


def _adjusted(comparisons: Sequence[Comparison], adjusted: Mapping[str, float]) -> list[dict[str, Any]]:
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
        "unfinished": {
            arm: {"run": run, "planned": planned} for arm, (run, planned) in unfinished(task).items()
        },
        "fresh": {
            arm: _fresh(task, arm)
            for arm in (*FRESHLY, task.moderate)
            if task.records(arm).keys() & set(SECOND_SEEDS)
        },
    }


def _fresh(task: TaskResults, arm: str) -> dict[str, Any]:
    """Where an arm ends on the second set of seeds alone."""
    records = {seed: record for seed, record in task.records(arm).items() if seed in SECOND_SEEDS}
    return {"n": len(records), "successes": sum(succeeded(record) for record in records.values())} | {
        split: plain(mean([end(split)(record) for record in records.values()])) for split in SPLITS
    }


def _of_arm(task: TaskResults, arm: str) -> dict[str, Any]:
    records = task.records(arm)
    successes = {split: sum(end(split)(record) >= SUCCESS for record in records.values()) for split in SPLITS}
    alphas = [record["alpha"] for record in records.values() if record["alpha"] is not None]
    scores: dict[str, Any] = {
        split: {
            name: plain(mean(list(task.values(arm, of(split)).values())))
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
        "reward_auc": plain(mean(list(task.values(arm, auc).values()))),
        "successes": successes["id"],
        "success_rate": plain(success_rate(successes["id"], len(records))),
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
