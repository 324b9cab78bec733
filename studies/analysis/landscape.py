"""What the measured landscape of the loss says of RL's success, by the rules of studies/plan_landscape.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.analysis.forecast import (
    Start,
    clustered_auc,
    having,
    resampled,
    roc_auc,
    spearman_within_seed,
    times_drawn,
)
from studies.analysis.results import TaskResults, end, succeeded
from studies.analysis.statistics import Estimate, mean, plain
from studies.arms import EPOCHS, EXCESSIVE
from studies.files import read_seeds

LOSSES = ("demonstrations", "base_samples")
CURVATURES = ("sharpness", "sam_gap", "relative_sam_gap")
MEASURES = tuple(f"{loss}/{name}" for loss in LOSSES for name in CURVATURES)
DRIFT = "relative_drift"
REFERENCES = (DRIFT, "token_entropy", "support", "alpha")  # of the same retrained starts
FUSED = "fusion_40"
SIDES = ("all", "over_trained")


def landscape_of(results: Path, tasks: Mapping[str, TaskResults]) -> dict[str, Any] | None:
    """Everything that is said of the landscape, as plain values; None without results.

    Args:
        results: docs/results.
        tasks: The results of the study, for what RL made of the starts.
    """
    measured = {name: read_seeds(results / "landscape" / f"{name}.jsonl") for name in tasks}
    measured = {name: seeds for name, seeds in measured.items() if seeds}
    if not measured:
        return None
    found = {name: joined(tasks[name], seeds) for name, seeds in measured.items()}
    sides = {
        "all": found,
        "over_trained": {name: over_trained_side(tasks[name], group) for name, group in found.items()},
    }
    return {
        "tasks": {name: _of_task(tasks[name], seeds) for name, seeds in measured.items()},
        "forecast": {side: forecast_of(groups) for side, groups in sides.items()},
    }


def values_of(record: Mapping[str, Any], arm: str) -> dict[str, float]:
    """The measures and references of a measured start by name; alpha of a rung of SFT is 1, of the base 0."""
    alpha = float(arm != "base") if record["alpha"] is None else record["alpha"]
    found = {f"{loss}/{name}": record[loss][name] for loss in LOSSES for name in CURVATURES}
    return {**found, **{name: record["measures"][name] for name in REFERENCES[:-1]}, "alpha": alpha}


def joined(task: TaskResults, measured: Mapping[int, Mapping[str, Any]]) -> list[Start]:
    """Measured starts whose arm and seed the study has run RL from."""
    return [
        Start(task.name, seed, arm, values_of(record, arm), end("id")(run), succeeded(run))
        for seed, content in measured.items()
        for arm, record in content["arms"].items()
        if (run := task.seeds.get(seed, {}).get(arm)) is not None
    ]


def over_trained_side(task: TaskResults, found: Sequence[Start]) -> list[Start]:
    """Without what has seen too little SFT to know the form."""
    ladder = [f"sft_{n}" for n in EPOCHS]
    early = {"base", "fusion_20", *ladder[: ladder.index(task.moderate)]}
    return [start for start in found if start.arm not in early]


def _of_task(task: TaskResults, measured: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    arms = dict.fromkeys(arm for content in measured.values() for arm in content["arms"])
    return {
        "title": task.title,
        "moderate": task.moderate,
        "seeds": list(measured),
        "bases_as_recorded": sum(content["base_as_recorded"] is True for content in measured.values()),
        "where": [
            dict(pairs) for pairs in {tuple(content["where"].items()) for content in measured.values()}
        ],
        "arms": {arm: _of_arm(task, arm, measured) for arm in arms},
        "changes": {
            name: {
                "over_moderate": plain(log_ratio(measured, EXCESSIVE, task.moderate, name)),
                "over_fused": plain(log_ratio(measured, EXCESSIVE, FUSED, name)),
            }
            for name in MEASURES
        },
    }


def _of_arm(task: TaskResults, arm: str, measured: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    records = {seed: content["arms"][arm] for seed, content in measured.items() if arm in content["arms"]}
    runs = [run for seed in records if (run := task.seeds.get(seed, {}).get(arm)) is not None]
    measures = [values_of(record, arm) for record in records.values()]
    return {
        "n": len(records),
        "runs": len(runs),
        "successes": sum(succeeded(run) for run in runs),
        "end": plain(mean([end("id")(run) for run in runs])) if runs else None,
        "measures": {name: plain(mean([values[name] for values in measures])) for name in MEASURES},
    }


def log_ratio(
    measured: Mapping[int, Mapping[str, Any]], ours: str, theirs: str, measure: str
) -> Estimate | None:
    """Mean over seeds of ``log(ours / theirs)`` with its t interval; seeds are left out where one is not positive."""
    loss, name = measure.split("/")
    pairs = [
        (content["arms"][ours][loss][name], content["arms"][theirs][loss][name])
        for content in measured.values()
        if {ours, theirs} <= content["arms"].keys()
    ]
    logs = [math.log(a / b) for a, b in pairs if a > 0 and b > 0]
    return mean(logs) if logs else None


def forecast_of(groups: Mapping[str, Sequence[Start]]) -> dict[str, Any]:
    """Every measure and reference: correlation, area and what it is above drift's, by task; and what follows.

    A measure's direction is that of its mean area over tasks; areas and differences are turned by it.
    """
    areas = {
        name: {task: roc_auc(group, name) for task, group in groups.items()}
        for name in (*MEASURES, *REFERENCES)
    }
    smaller = {name: _smaller(list(found.values())) for name, found in areas.items()}
    rows: dict[str, Any] = {}
    for name in areas:
        by_task = {
            task: {
                "spearman": plain(spearman_within_seed(group, name)),
                "roc_auc": plain(areas[name][task]),
                "above_drift": plain(above_drift(group, name, smaller[name], smaller[DRIFT])),
            }
            for task, group in groups.items()
        }
        rows[name] = {"smaller": smaller[name], "tasks": by_task, **conclusion(list(by_task.values()))}
    counts = {
        task: {"starts": len(group), "successes": sum(start.success for start in group)}
        for task, group in groups.items()
    }
    return {"measures": rows, "counts": counts}


def _smaller(found: Sequence[Estimate | None]) -> bool:
    values = [area.value for area in found if area is not None]
    return bool(values) and sum(values) < len(values) / 2


def above_drift(group: Sequence[Start], measure: str, smaller: bool, smaller_drift: bool) -> Estimate | None:
    """The turned area of a measure minus that of drift on the same starts; a paired bootstrap of whole seeds."""
    both = having(having(group, measure), DRIFT)
    ours, theirs = roc_auc(both, measure), roc_auc(both, DRIFT)
    if ours is None or theirs is None:
        return None
    sign, sign_drift = (-1 if turned else 1 for turned in (smaller, smaller_drift))
    value = sign * (ours.value - 0.5) - sign_drift * (theirs.value - 0.5)
    clusters = len({start.cluster for start in both})
    if clusters < 3:
        return Estimate(len(both), value, None, None)
    times = times_drawn(clusters)
    replicates = [clustered_auc(both, name, times) - 0.5 for name in (measure, DRIFT)]
    low, high = resampled(sign * replicates[0] - sign_drift * replicates[1])
    return Estimate(len(both), value, low, high)


def conclusion(by_task: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether a measure "says something" in the plan's sense, and whether clearly better than drift: in every task."""
    correlations = [row["spearman"] for row in by_task]
    differences = [row["above_drift"] for row in by_task]
    if any(row is None or row["low"] is None for row in (*correlations, *differences)):
        return {"correlated": False, "says": False, "clearly": False}
    correlated = all(row["low"] > 0 for row in correlations) or all(row["high"] < 0 for row in correlations)
    says = correlated and all(row["value"] > 0 for row in differences)
    clearly = says and all(row["low"] > 0 for row in differences)
    return {"correlated": correlated, "says": says, "clearly": clearly}
