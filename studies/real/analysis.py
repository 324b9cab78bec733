"""What the raw results say: a row for every arm of a recipe, and the differences that the plan asks for."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from studies.analysis.statistics import Difference, paired
from studies.real.arms import ARMS

SUCCESS = 0.25  # pass@1 in distribution after RL; see the plan
MARGIN = 0.1  # a smaller difference of pass@1 does not matter; see the plan
ENOUGH_SEEDS = 3  # fewer SFT seeds are an example, and are given no interval


class Question(NamedTuple):
    """One arm against another."""

    ours: str
    theirs: str
    primary: bool
    text: str


QUESTIONS = (
    Question("fusion", "excessive", True, "Fusion against excessive SFT"),
    Question("fusion_reset", "fusion", True, "The targeted reset on top of fusion, against fusion alone"),
    Question("fusion_reset", "fusion_random", True, "The targeted reset against random neurons, as many"),
    Question("fusion_random", "fusion", False, "Random neurons on top of fusion, against fusion alone"),
    Question("fusion", "moderate", False, "Fusion against moderate SFT"),
    Question("fusion", "longer", False, "Fusion against 4 times the RL steps on the excessive checkpoint"),
    Question("fusion_refit", "fusion", False, "The refit on top of fusion, against fusion alone"),
    Question("fusion", "refit", False, "Fusion against the refit alone"),
)


@dataclass(frozen=True)
class Run:
    """One run of RL.

    Args:
        recipe: Its recipe.
        arm: Its arm.
        sft_seed: Its SFT seed.
        rl_seed: Its RL seed.
        start: What was measured before RL.
        end: What was measured after it, with curves and seconds.
    """

    recipe: str
    arm: str
    sft_seed: int
    rl_seed: int
    start: Mapping[str, Any]
    end: Mapping[str, Any]

    @property
    def pass_at_1(self) -> float:
        """In distribution, after RL."""
        return float(self.end["id"]["pass_at_1"])

    @property
    def reward(self) -> float:
        """Mean reward over all steps of RL: of more responses than any evaluation has."""
        return fmean(self.end["curves"]["reward"])


def load(root: Path) -> list[Run]:
    """All finished runs below a directory, in order of recipe, arm and seeds."""
    return sorted(
        _read(root), key=lambda run: (run.recipe, [*ARMS].index(run.arm), run.sft_seed, run.rl_seed)
    )


def _read(root: Path) -> Iterator[Run]:
    for path in root.glob("*/seed_*.json"):
        content = json.loads(path.read_text())
        for arm, results in content["arms"].items():
            start = content["starts"][ARMS[arm].start]
            for rl_seed, end in results.items():
                yield Run(content["recipe"], arm, content["sft_seed"], int(rl_seed), start, end)


def starts(root: Path) -> dict[tuple[str, int], Mapping[str, Any]]:
    """What was measured of every start before RL, by recipe and SFT seed, whether RL has been run from it or not."""
    contents = [json.loads(path.read_text()) for path in sorted(root.glob("*/seed_*.json"))]
    return {(content["recipe"], content["sft_seed"]): content["starts"] for content in contents}


def by_arm(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by recipe and arm."""
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        found[run.recipe, run.arm].append(run)
    return dict(found)


def difference(runs: Sequence[Run], question: Question, value: Callable[[Run], float]) -> Difference | None:
    """The mean difference over SFT seeds, each the mean over the RL seeds that both arms have.

    Args:
        runs: All runs, of several recipes perhaps: seed 101 of one is another than that of the other.
        question: Which arms.
        value: What is compared.

    Returns:
        None if no run of one arm has a partner; without interval and p below `ENOUGH_SEEDS`.
    """
    sides: dict[str, dict[tuple[str, int, int], float]] = {question.ours: {}, question.theirs: {}}
    for run in runs:
        if run.arm in sides:
            sides[run.arm][run.recipe, run.sft_seed, run.rl_seed] = value(run)
    ours, theirs = sides[question.ours], sides[question.theirs]
    shared: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for recipe, sft_seed, rl_seed in sorted(ours.keys() & theirs.keys()):
        key = recipe, sft_seed, rl_seed
        shared[recipe, sft_seed].append((ours[key], theirs[key]))
    ours_of, theirs_of = (
        {seed: fmean(pair[side] for pair in pairs) for seed, pairs in shared.items()} for side in (0, 1)
    )
    return between(ours_of, theirs_of)


def between(
    ours: Mapping[tuple[str, int], float], theirs: Mapping[tuple[str, int], float]
) -> Difference | None:
    """The mean difference of values by recipe and SFT seed, where both have one.

    Returns:
        None if they share no SFT seed; without interval and p below `ENOUGH_SEEDS`.
    """
    found = paired(ours, theirs, test=True)
    if found is None or found.estimate.n >= ENOUGH_SEEDS:
        return found
    return found._replace(estimate=found.estimate._replace(low=None, high=None), p=None)


def differences(runs: Sequence[Run]) -> list[tuple[Question, Difference, Difference]]:
    """Every question that runs can say something about.

    Returns:
        The question, the difference of pass@1 after RL, and that of the mean reward during RL.
    """
    return [
        (question, end, during)
        for question in QUESTIONS
        if (end := difference(runs, question, lambda run: run.pass_at_1)) is not None
        and (during := difference(runs, question, lambda run: run.reward)) is not None
    ]


def verdict(found: Difference) -> str:
    """What an interval says.

    >>> from studies.analysis.statistics import Estimate
    >>> [verdict(Difference(Estimate(6, m, m - h, m + h), 0, 0, None)) for m, h in ((0.3, 0.1), (0, 0.05), (0, 0.2))]
    ['above', 'no difference that matters', 'not told apart']
    """
    estimate = found.estimate
    if estimate.low is None or estimate.high is None:
        return "too few seeds to tell"
    if estimate.low > -MARGIN and estimate.high < MARGIN:
        return "no difference that matters"
    if estimate.above or estimate.below:
        return "above" if estimate.above else "below"
    return "not told apart"
