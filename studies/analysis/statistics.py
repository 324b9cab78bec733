"""Means, paired differences and success rates over seeds, with what is known of their uncertainty."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SUCCESS = 0.5  # a seed has succeeded if RL ends at this pass@1 or above, in distribution
RESAMPLES = 19_999  # all sign flips up to 14 pairs; this many random ones beyond


class Estimate(NamedTuple):
    """A mean or another figure with its interval; the bounds are None where one value gives none."""

    n: int
    value: float
    low: float | None
    high: float | None

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and self.high < 0


class Difference(NamedTuple):
    """Paired differences over the seeds that have both sides."""

    estimate: Estimate
    wins: int
    losses: int
    p: float | None


def mean(values: Sequence[float]) -> Estimate:
    """Mean with its confidence interval by Student's t, for one value per seed.

    The interval is symmetric and may leave [0, 1]; values that are all equal give one of no width.

    >>> mean([0.8, 1.0])
    Estimate(n=2, value=0.9, low=-0.370..., high=2.170...)
    """
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("Expected at least one value but got none.")
    centre = float(data.mean())
    if data.size == 1:
        return Estimate(1, centre, None, None)
    half = float(stats.sem(data) * stats.t.ppf((1 + CONFIDENCE) / 2, data.size - 1))
    return Estimate(data.size, centre, centre - half, centre + half)


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float], test: bool = False) -> Difference | None:
    """`ours` minus `theirs` over the seeds that both have; None if they share none.

    Args:
        ours: Value by seed.
        theirs: The same of what it is compared with.
        test: Compute a p-value as well.

    Returns:
        The mean difference with its t interval, how many seeds it is positive and negative in, and the
        two-sided p-value of the sign-flip permutation test, which needs no normal distribution: outcomes here
        are bimodal. It is None unless asked for, and for one seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    return Difference(
        mean(differences),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
        sign_flip_p(differences) if test and len(seeds) > 1 else None,
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the permutation test that flips the sign of each pair; 1 if all are 0."""
    data = np.asarray(differences, dtype=float)
    if not data.any():
        return 1.0
    result = stats.permutation_test(
        (data,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def mcnemar_p(ours: Mapping[Any, bool], theirs: Mapping[Any, bool]) -> float | None:
    """Two-sided exact p-value of McNemar's test over the pairs that both have; None if they share none.

    Pairs of which one side alone succeeds are the only ones that count: a sign test on them. Without any it is 1.

    >>> mcnemar_p({1: True, 2: True, 3: True, 4: True}, {1: False, 2: False, 3: False, 4: True})
    0.25
    """
    pairs = ours.keys() & theirs.keys()
    if not pairs:
        return None
    won = sum(ours[pair] and not theirs[pair] for pair in pairs)
    lost = sum(theirs[pair] and not ours[pair] for pair in pairs)
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def success_rate(successes: int, n: int) -> Estimate:
    """Share of successes with Wilson's interval, which also makes sense at 0 and 1.

    >>> success_rate(20, 20)
    Estimate(n=20, value=1.0, low=0.838..., high=1.0)
    """
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(n, successes / n, float(interval.low), float(interval.high))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: below .05 where the family's error rate is.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted: dict[str, float] = {}
    so_far = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = so_far
    return adjusted


def plain(estimate: Estimate | None) -> dict[str, Any] | None:
    """An estimate as the summary holds it."""
    return None if estimate is None else estimate._asdict()


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; None where one side does not vary."""
    if len(x) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        rho = float(stats.spearmanr(x, y).statistic)
    return None if np.isnan(rho) else rho
