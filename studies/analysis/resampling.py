"""Interquartile mean and probability of improvement over runs of several tasks, with stratified bootstraps.

As in Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021
(https://arxiv.org/abs/2108.13264), and their package rliable: a stratum is a task, and runs are drawn with replacement
within each task.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from studies.analysis.statistics import CONFIDENCE, Estimate

DRAWS = 10_000  # of the bootstrap
TRIMMED = 0.25  # of the runs at either end, that the interquartile mean leaves out
Strata = Sequence[Sequence[float]]


def interquartile_mean(strata: Strata, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of the middle half of all runs, with a percentile interval.

    Args:
        strata: Values by task.
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        The estimate; without an interval where no task has two runs.

    >>> interquartile_mean([[0.0, 0.2], [0.4, 9.0]]).value
    0.3...

    Raises:
        ValueError: There is no run.
    """
    tasks = [np.asarray(values, dtype=float) for values in strata if len(values)]
    if not tasks:
        raise ValueError("Expected at least one value but got none.")
    whole = np.concatenate(tasks)
    value = float(stats.trim_mean(whole, TRIMMED))
    generator = np.random.default_rng(seed)
    drawn = np.concatenate(
        [values[generator.integers(len(values), size=(draws, len(values)))] for values in tasks], axis=1
    )
    few = max(len(values) for values in tasks) < 2
    return _with_interval(len(whole), value, None if few else stats.trim_mean(drawn, TRIMMED, axis=1))


def probability_of_improvement(
    ours: Strata, theirs: Strata, draws: int = DRAWS, seed: int = 0
) -> Estimate | None:
    """How probable it is that a run of ours ends higher than one of theirs, on a task drawn at random.

    The mean over tasks of the share of all pairs of runs in which ours is higher; a tie counts one half. Both sides
    are resampled independently of each other: runs are not paired by seed here.

    Args:
        ours: Values by task.
        theirs: The same of what it is compared with, tasks in the same order.
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        The estimate, `n` is the number of our runs; None if no task has runs of both.

    >>> probability_of_improvement([[0.5, 0.9]], [[0.1, 0.5]]).value
    0.875
    """
    tasks = [
        (np.asarray(our, dtype=float), np.asarray(their, dtype=float))
        for our, their in zip(ours, theirs, strict=True)
        if len(our) and len(their)
    ]
    if not tasks:
        return None
    generator = np.random.default_rng(seed)
    values, drawn = [], []
    for our, their in tasks:
        higher = (np.sign(our[:, None] - their[None, :]) + 1) / 2
        values.append(higher.mean())
        drawn.append(
            np.einsum("di,ij,dj->d", _shares(generator, draws, our), higher, _shares(generator, draws, their))
        )
    few = max(len(side) for task in tasks for side in task) < 2
    return _with_interval(
        sum(len(our) for our, _ in tasks), float(np.mean(values)), None if few else np.mean(drawn, axis=0)
    )


def _shares(generator: np.random.Generator, draws: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each bootstrap sample is each run, ``[draws, runs]``."""
    count = len(values)
    shares: NDArray[np.float64] = generator.multinomial(count, [1 / count] * count, size=draws) / count
    return shares


def _with_interval(n: int, value: float, drawn: NDArray[np.float64] | None) -> Estimate:
    if drawn is None:
        return Estimate(n, value, None, None)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(n, value, float(low), float(high))
