"""How well a measure tells success from failure among starts of one recipe, which differ in their seeds alone.

Over all starts a measure may only tell one recipe from another: an alpha of 0.8 from one of 0.4. What is asked here is
whether it says anything of the checkpoint at hand once its recipe is known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from studies.analysis.forecast import (
    Start,
    counts,
    having,
    measures_of,
    resampled,
    roc_auc,
    starts,
    times_drawn,
)
from studies.analysis.results import TaskResults
from studies.analysis.statistics import Estimate, plain

Stratum = Callable[[Start], Hashable]


class Concordance(NamedTuple):
    """A ROC-AUC that compares only starts of one stratum.

    Args:
        area: Share of its (success, failure) pairs in which the success has the larger value, ties counting half;
            its interval resamples whole seeds; ``n`` counts the starts of the strata that have both outcomes.
        strata: How many have both.
        pairs: How many pairs they hold.
    """

    area: Estimate
    strata: int
    pairs: int


def by_arm(start: Start) -> Hashable:
    """Starts of one arm of one task differ in their seed alone."""
    return (start.task, start.arm)


def with_references(tasks: Sequence[TaskResults], over_trained_side: bool = False) -> list[Start]:
    """The starts of `forecast.starts` with more to compare their measures with.

    To them come ``style_rate``, the share of the start's own responses in the careful style, which is a habit of the
    base's and not of the demonstrations; ``base_style_rate``, the same of the seed's base, where RL ran from it too;
    ``base_solved``, the share of the base's own samples that solve the task; and ``alpha``, 1 for a rung of SFT and 0
    for the base.
    """
    by_name = {task.name: task for task in tasks}
    found = []
    for start in starts(tasks, over_trained_side):
        task = by_name[start.task]
        arms = task.seeds[start.seed]
        record = arms[start.arm]
        alpha = record["alpha"]
        measures = {
            **start.measures,
            "style_rate": record["id"]["start"]["style_rate"],
            "base_solved": task.solved[start.seed],
            "alpha": float(start.arm != "base") if alpha is None else alpha,
        }
        if "base" in arms:
            measures["base_style_rate"] = arms["base"]["id"]["start"]["style_rate"]
        found.append(start._replace(measures=measures))
    return found


def concordance(found: Sequence[Start], measure: str, stratum: Stratum = by_arm) -> Concordance | None:
    """The ROC-AUC of "a larger value, a success" over the pairs within the strata, all pairs weighing the same.

    Returns:
        None without a stratum that has a success and a failure. Below .5 smaller values go with success.
    """
    strata: dict[Hashable, list[Start]] = {}
    for start in having(found, measure):
        strata.setdefault(stratum(start), []).append(start)
    mixed = [group for group in strata.values() if len({start.success for start in group}) == 2]
    if not mixed:
        return None
    clusters = sorted({start.cluster for group in mixed for start in group})
    place = {cluster: number for number, cluster in enumerate(clusters)}
    won, pairs = np.zeros((2, len(clusters), len(clusters)))
    for group in mixed:
        for up in (start for start in group if start.success):
            for down in (start for start in group if not start.success):
                at = place[up.cluster], place[down.cluster]
                above, below = up.measures[measure], down.measures[measure]
                won[at] += (above > below) + 0.5 * (above == below)
                pairs[at] += 1
    starts_of = sum(len(group) for group in mixed)
    value = float(won.sum() / pairs.sum())
    low, high = resampled(_replicates(won, pairs, times_drawn(len(clusters))))
    return Concordance(Estimate(starts_of, value, low, high), len(mixed), int(pairs.sum()))


def _replicates(won: np.ndarray, pairs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The area of each replicate of a bootstrap of whole seeds, ``[R]``: quadratic forms in their multiplicities."""
    above, all_of = (((times @ matrix) * times).sum(axis=1) for matrix in (won, pairs))
    return np.divide(above, all_of, out=np.full(len(times), np.nan), where=all_of > 0)


def rows_of(found: Sequence[Start], strata: Mapping[str, Stratum]) -> dict[str, Any]:
    """Each measure's ROC-AUC over all starts, and within each kind of stratum, as plain values."""
    rows: dict[str, Any] = {}
    for measure in measures_of(found):
        everywhere = roc_auc(found, measure)
        if everywhere is None:
            continue
        within = {name: concordance(found, measure, of) for name, of in strata.items()}
        rows[measure] = {
            "all": plain(everywhere),
            **{
                name: None
                if row is None
                else {**row.area._asdict(), "strata": row.strata, "pairs": row.pairs}
                for name, row in within.items()
            },
        }
    return {
        **counts(found),
        "measures": rows,
    }


def within_of(tasks: Mapping[str, TaskResults]) -> dict[str, Any]:
    """What the summary holds of this, by task: the starts on the over-trained side, as in the other tables."""
    return {
        name: rows_of(with_references([task], over_trained_side=True), {"within": by_arm})
        for name, task in tasks.items()
    }
