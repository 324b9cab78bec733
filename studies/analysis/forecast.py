"""How well a measure taken before RL says whether RL will succeed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from studies.analysis.results import TaskResults, end, succeeded
from studies.analysis.statistics import CONFIDENCE, Estimate, mean, spearman
from studies.arms import ARMS

RESAMPLES = 4_000


class Start(NamedTuple):
    """One model before RL, and what became of it; `form_rate` is the share of its responses with the closing form."""

    task: str
    seed: int
    arm: str
    measures: Mapping[str, float]
    end: float
    success: bool
    form_rate: float = 1.0

    @property
    def cluster(self) -> tuple[str, int]:
        """Starts of one seed share base and SFT run: they are resampled together."""
        return (self.task, self.seed)


def counts(group: Sequence[Start]) -> dict[str, int]:
    """How many starts there are, how many succeeded, and of how many seeds they are."""
    return {
        "starts": len(group),
        "successes": sum(start.success for start in group),
        "seeds": len({start.cluster for start in group}),
    }


def starts(tasks: Sequence[TaskResults], over_trained_side: bool = False) -> list[Start]:
    """Every start that got the standard RL, once.

    The remedies within RL share one start and differ after it, and a copied record is no further evidence:
    both are left out. To the measures come ``token_entropy_ratio``, the token entropy over the base's, and the
    start's own ``pass_at_1`` and ``pass_at_8`` in distribution.

    Args:
        tasks: What to take them from.
        over_trained_side: Leave out what has seen too little SFT to know the form: the base, the ladder below
            moderate, fusions below 0.3. A measure of lost plasticity cannot see that lack.
    """
    found = []
    for task in tasks:
        ladder = [arm for arm in ARMS if arm.startswith("sft_")]
        early = {"base", "fusion_10", "fusion_20", *ladder[: ladder.index(task.moderate)]}
        for seed, arms in task.seeds.items():
            entropy = arms.get("base", {}).get("measures", {}).get("token_entropy")
            for arm, record in arms.items():
                if ARMS[arm].group == "remedy" or record.get("same_as"):
                    continue
                if over_trained_side and arm in early:
                    continue
                measures = {
                    name: float(value)
                    for name, value in record["measures"].items()
                    if value is not None and not math.isnan(value)
                }
                before = record["id"]["start"]
                measures |= {"pass_at_1": before["pass_at_1"], "pass_at_8": before["pass_at_k"]}
                if entropy and "token_entropy" in measures:
                    measures["token_entropy_ratio"] = measures["token_entropy"] / entropy
                found.append(
                    Start(
                        task.name,
                        seed,
                        arm,
                        measures,
                        end("id")(record),
                        succeeded(record),
                        before["form_rate"],
                    )
                )
    return found


def having(found: Sequence[Start], measure: str) -> list[Start]:
    """Those starts that have the measure."""
    return [start for start in found if measure in start.measures]


def spearman_within_seed(found: Sequence[Start], measure: str) -> Estimate | None:
    """Rank correlation of measure and end point over the arms of a seed; mean and interval over seeds."""
    clusters: dict[tuple[str, int], list[Start]] = {}
    for start in having(found, measure):
        clusters.setdefault(start.cluster, []).append(start)
    each = [
        spearman([start.measures[measure] for start in group], [start.end for start in group])
        for group in clusters.values()
    ]
    defined = [rho for rho in each if rho is not None]
    return mean(defined) if defined else None


def roc_auc(found: Sequence[Start], measure: str) -> Estimate | None:
    """ROC-AUC of "a larger value, a success", with a bootstrap interval that resamples whole seeds.

    Returns:
        The area, its percentile interval and the number of starts; None without a success and a failure.
        Below .5 smaller values go with success.
    """
    group = having(found, measure)
    outcomes = [start.success for start in group]
    if len(set(outcomes)) < 2:
        return None
    area = float(roc_auc_score(outcomes, [start.measures[measure] for start in group]))
    clusters = len({start.cluster for start in group})
    if clusters < 3:
        return Estimate(len(group), area, None, None)
    low, high = resampled(clustered_auc(group, measure, times_drawn(clusters)))
    return Estimate(len(group), area, low, high)


def resampled(values: np.ndarray) -> tuple[float | None, float | None]:
    """Percentile interval of a figure's bootstrap replicates, those left out in which it is not defined (NaN)."""
    if np.isnan(values).all():
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache
def times_drawn(clusters: int) -> np.ndarray:
    """How often each replicate of the bootstrap draws each seed, ``[RESAMPLES, clusters]``."""
    draws = np.random.default_rng(0).integers(clusters, size=(RESAMPLES, clusters))
    return np.stack([(draws == cluster).sum(axis=1) for cluster in range(clusters)], axis=1)


def clustered_auc(group: Sequence[Start], measure: str, times: np.ndarray) -> np.ndarray:
    """The area of each replicate of a bootstrap that draws whole seeds.

    The area is the share of (success, failure) pairs in which the success has the larger value, ties
    counting half. Counted seed by seed, a replicate is a quadratic form in the seeds' multiplicities.

    Args:
        group: Starts that have the measure.
        measure: The measure.
        times: How often each replicate draws each seed, ``[R, seeds]``, the seeds in order.

    Returns:
        ``[R]``; NaN where a replicate drew no success or no failure.
    """
    place = {cluster: number for number, cluster in enumerate(sorted({start.cluster for start in group}))}
    sides = [[start for start in group if start.success is side] for side in (True, False)]
    up, down = (np.array([start.measures[measure] for start in side]) for side in sides)
    # One row for each seed: which starts of a side are its own.
    of_up, of_down = (np.eye(len(place))[:, [place[start.cluster] for start in side]] for side in sides)
    won = of_up @ ((up[:, None] > down) + 0.5 * (up[:, None] == down)) @ of_down.T
    ups, downs = of_up.sum(axis=1), of_down.sum(axis=1)

    pairs = (times @ ups) * (times @ downs)
    areas = np.full(len(times), math.nan)
    np.divide(((times @ won) * times).sum(axis=1), pairs, out=areas, where=pairs > 0)
    return areas


def measures_of(found: Sequence[Start]) -> list[str]:
    """Every measure that some start has."""
    return list(dict.fromkeys(name for start in found for name in start.measures))
