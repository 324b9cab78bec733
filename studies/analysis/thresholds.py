"""Cuts in a measure, chosen on one half of the seeds and scored on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from studies.analysis.forecast import Start, having
from studies.analysis.statistics import Estimate, success_rate

CERTAIN = 0.95  # share of successes (failures) that makes a region safe (lost)


class Threshold(NamedTuple):
    """A cut chosen on one half of the seeds and scored on the other.

    Args:
        value: Half-way between two neighbouring values of the choosing half.
        larger_is_better: On which side success is expected.
        chosen_on: Starts that it was chosen on.
        scored_on: Starts of the other half.
        sensitivity: Share of the held-out successes on the good side.
        specificity: Share of the held-out failures on the bad side.
    """

    value: float
    larger_is_better: bool
    chosen_on: int
    scored_on: int
    sensitivity: float
    specificity: float

    @property
    def balanced_accuracy(self) -> float:
        """Mean of sensitivity and specificity: .5 is a guess."""
        return (self.sensitivity + self.specificity) / 2


def halves(found: Sequence[Start]) -> tuple[list[Start], list[Start]]:
    """Starts of the even seeds, on which thresholds are chosen, and of the odd ones, which are held out."""
    return [s for s in found if s.seed % 2 == 0], [s for s in found if s.seed % 2 == 1]


def threshold(choose: Sequence[Start], score: Sequence[Start], measure: str) -> Threshold | None:
    """The cut with the largest balanced accuracy on `choose`, scored on `score`.

    None where either has no success or no failure, or where no cut is better than a guess.
    """
    choose, score = having(choose, measure), having(score, measure)
    if any(len({start.success for start in half}) < 2 for half in (choose, score)):
        return None
    values = np.array([start.measures[measure] for start in choose])
    outcomes = np.array([start.success for start in choose])
    sign = 1.0 if roc_auc_score(outcomes, values) >= 0.5 else -1.0
    wrong, right, cuts = roc_curve(outcomes, sign * values, drop_intermediate=False)
    best = int((right - wrong).argmax())
    if right[best] <= wrong[best]:
        return None
    cut = cuts[best]
    beyond = sign * values[sign * values < cut]
    middle = (cut + beyond.max()) / 2 if beyond.size else cut
    good = np.array([sign * start.measures[measure] >= middle for start in score])
    truth = np.array([start.success for start in score])
    return Threshold(
        float(sign * middle),
        sign > 0,
        len(choose),
        len(score),
        float(good[truth].mean()),
        float((~good[~truth]).mean()),
    )


class Bounds(NamedTuple):
    """Where nearly everything succeeds and where nearly nothing does, with the held-out half's record.

    Args:
        safe: From here on the better side at least 95 % of the choosing half succeed; None if nowhere.
        lost: From here on the worse side at most 5 % do; None if nowhere.
        above_safe: Held-out success rate on the better side of `safe`.
        between: The same between the two.
        below_lost: The same on the worse side of `lost`.
    """

    safe: float | None
    lost: float | None
    above_safe: Estimate | None
    between: Estimate | None
    below_lost: Estimate | None


def bounds(choose: Sequence[Start], score: Sequence[Start], measure: str) -> Bounds | None:
    """Two thresholds of a measure of which more is better, such as the verdict has.

    They are the weakest value with 95 % of successes above it, and the largest with 5 % below it.
    """
    choose, score = having(choose, measure), having(score, measure)
    if not choose or not score:
        return None
    ordered = sorted((start.measures[measure], start.success) for start in choose)
    values = np.array([value for value, _ in ordered])
    success = np.array([outcome for _, outcome in ordered], dtype=float)
    below = np.cumsum(success) / np.arange(1, len(success) + 1)
    above = np.cumsum(success[::-1])[::-1] / np.arange(len(success), 0, -1)
    safe = _midpoint(values, int(np.argmax(above >= CERTAIN))) if (above >= CERTAIN).any() else None
    is_lost = np.flatnonzero(below <= 1 - CERTAIN)
    lost = _midpoint(values, int(is_lost[-1]) + 1) if is_lost.size else None
    if safe is not None and lost is not None and lost > safe:
        lost = safe = (lost + safe) / 2
    of: dict[bool | None, list[bool]] = {True: [], False: [], None: []}
    for start in score:
        value = start.measures[measure]
        where = True if safe is not None and value >= safe else None
        where = False if lost is not None and value < lost else where
        of[where].append(start.success)
    rates = {where: success_rate(sum(found), len(found)) if found else None for where, found in of.items()}
    return Bounds(safe, lost, rates[True], rates[None], rates[False])


def _midpoint(values: np.ndarray, index: int) -> float:
    """Between the value at `index` and the one before it, so that the cut belongs to no start."""
    if index == 0:
        return float(values[0])
    if index == len(values):
        return float(values[-1])
    return float((values[index - 1] + values[index]) / 2)
