"""Which arms are compared, and which comparisons were named before the first reported seed ran."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from studies.analysis.results import Of, TaskResults, auc, end, pooled
from studies.analysis.statistics import Difference, holm, paired
from studies.arms import EXCESSIVE, FIRST_SEEDS, SECOND_SEEDS

OUTCOMES: dict[str, Of] = {"id": end("id"), "ood": end("ood"), "auc": auc}


class Pair(NamedTuple):
    """`ours` minus `theirs`, and the question that it answers."""

    ours: str
    theirs: str
    question: str = ""

    @property
    def name(self) -> str:
        """How the comparison is called in the summary."""
        return f"{self.ours} - {self.theirs}"


class Family(NamedTuple):
    """Pairs that were named before any of the seeds that count for them had been seen."""

    pairs: tuple[Pair, ...]
    seeds: tuple[int, ...]


#: The confirmatory family: each on the end point in distribution, each task by itself, all seeds.
CONFIRMATORY = (
    Pair("rigid_reset", "rigid_random", "do the targeted neurons matter, or only how many are reset?"),
    Pair("rigid_reset", "rigid_equal_support", "does a reset do more than a smaller alpha?"),
    Pair("rigid_paper", "rigid_paper_random", "does targeting matter with the paper's rule?"),
    Pair("rigid_reset", "rigid_paper", "sharpened positions against the paper's rule"),
    Pair("auto_reset", "auto_nll_100", "does a reset add anything at a good alpha?"),
)

#: When the second family was named, the analysis had been run on the seeds before this one only.
FRESH = 1008
#: What the seeds before `FRESH` suggested, on the others of the first set, both tasks pooled.
SECOND = Family(
    (
        Pair(
            "rigid_entropy",
            "rigid_random",
            "the entropy gradient's neurons against random ones, alpha too large",
        ),
        Pair("rigid_entropy", "rigid_equal_support", "the same against a smaller alpha"),
        Pair("rigid_entropy", "rigid_reset", "the same against those of the target logit"),
        Pair(
            "auto_reset_entropy",
            "auto_nll_100",
            "the entropy gradient's neurons against none, automatic alpha",
        ),
        Pair("auto_reset_entropy", "auto_reset", "the same against those of the target logit"),
    ),
    tuple(seed for seed in FIRST_SEEDS if seed >= FRESH),
)

#: What the defaults rest on, tested once more on the second set of seeds, both tasks pooled: named when the
#: defaults had been chosen, before any of these seeds had run.
THIRD = Family(
    (
        Pair(
            "rigid_entropy",
            "rigid_entropy_random",
            "the entropy gradient's neurons against random ones, as many of each matrix, alpha too large",
        ),
        Pair(
            "rigid_entropy",
            "rigid_entropy_equal_support",
            "the same against a smaller alpha of equal support",
        ),
        Pair("rigid_entropy", "rigid_reset", "the same against those of the target logit"),
        Pair(
            "auto_reset_entropy",
            "auto_nll_100",
            "the entropy gradient's neurons against none, automatic alpha",
        ),
        Pair(
            "auto_reset_entropy", "auto_reset_random", "the same against random ones, as many of each matrix"
        ),
    ),
    SECOND_SEEDS,
)

#: Exploratory: what else the arms can tell about the reset, over all seeds that have both.
EXPLORATORY = (
    Pair("rigid_reset", "rigid", "a reset against none, alpha too large"),
    Pair("rigid_random", "rigid", "random neurons against none, alpha too large"),
    Pair("fusion_50_reset", "fusion_50", "a reset against none, alpha 0.5"),
    Pair("fusion_50_reset", "fusion_50_random", "targeted against random neurons, alpha 0.5"),
    Pair("fusion_50_reset", "fusion_50_equal_support", "a reset against a smaller alpha, from 0.5"),
    Pair("reset_alone", EXCESSIVE, "a reset without fusion"),
    # Added when the first seeds had been seen.
    Pair("rigid_entropy", "rigid", "the entropy gradient's neurons against none, alpha too large"),
    Pair("auto_reset_entropy", "auto_reset", "against those of the target logit, automatic alpha"),
    Pair("auto_reset_entropy_4", "auto_reset_entropy", "twice as many neurons, automatic alpha"),
)

#: Arms that differ from `rigid_entropy` in one option.
ENTROPY_OPTIONS = (
    "rigid_entropy_absolute",
    "rigid_entropy_gap",
    "rigid_entropy_positions_2",
    "rigid_entropy_layer",
    "rigid_entropy_module",
    "rigid_entropy_05",
    "rigid_entropy_1",
    "rigid_entropy_2",
    "rigid_entropy_8",
)

#: Options of the reset, each against the same reset without it: quantity, ranking, positions, scope, share.
VARIANTS = (
    Pair("rigid_reset", "rigid_entropy"),
    Pair("rigid_signed", "rigid_reset"),
    *(Pair(arm, "rigid_entropy") for arm in ENTROPY_OPTIONS),
)

#: Other alphas, and resets after the automatic one, each against the default rule without a reset.
RULES = tuple(
    Pair(arm, "auto_nll_100")
    for arm in (
        "auto_nll_60",
        "auto_nll_150",
        "auto_support",
        "auto_kl",
        "auto_entropy",
        "fusion_30",
        "fusion_40",
        "fusion_50",
        "auto_reset",
        "auto_reset_entropy",
    )
)


class Comparison(NamedTuple):
    """One pair on one outcome, in one task or over all of them."""

    pair: Pair
    task: str
    outcome: str
    difference: Difference


def compare(
    pairs: Sequence[Pair],
    tasks: Mapping[str, TaskResults],
    test: bool = False,
    seeds: Container[int] | None = None,
) -> list[Comparison]:
    """Every pair on every outcome in every task that has both arms in some seed, and pooled over tasks.

    The pooled rows carry the task name "all": the seeds of both tasks, each weighing the same.

    Args:
        pairs: What is compared.
        tasks: The results.
        test: Whether end points in distribution get p-values.
        seeds: Those that count; all by default.
    """

    def values(members: Sequence[TaskResults], arm: str, of: Of) -> dict[tuple[str, int], float]:
        found = pooled(members, arm, of)
        return {key: value for key, value in found.items() if seeds is None or key[1] in seeds}

    scopes: list[tuple[str, list[TaskResults]]] = [(name, [task]) for name, task in tasks.items()]
    if len(tasks) > 1:
        scopes.append(("all", list(tasks.values())))
    found = []
    for pair in pairs:
        for name, members in scopes:
            for outcome, of in OUTCOMES.items():
                difference = paired(
                    values(members, pair.ours, of),
                    values(members, pair.theirs, of),
                    test=test and outcome == "id",
                )
                if difference is not None:
                    found.append(Comparison(pair, name, outcome, difference))
    return found


def confirmed(comparisons: Sequence[Comparison], pooled_tasks: bool = False) -> dict[str, float]:
    """Holm-adjusted p-value of each comparison of a family, by ``"<task>: <pair>"``.

    The family is made of the end points in distribution: of the single tasks, or pooled over them.
    """
    return holm(
        {
            f"{found.task}: {found.pair.name}": found.difference.p
            for found in comparisons
            if found.outcome == "id" and (found.task == "all") == pooled_tasks
            if found.difference.p is not None
        }
    )
