"""What the second edition explores: paired differences without adjustment, and rliable's statistics of whole runs."""

from __future__ import annotations

from studies.analysis.comparisons import Pair
from studies.analysis.markdown import DASH, MINUS, NONE, interval, signed, table
from studies.analysis.resampling import interquartile_mean, probability_of_improvement
from studies.analysis.results import end
from studies.analysis.second_tables import kind_of
from studies.analysis.second_values import (
    DEFAULT,
    EMBEDDINGS,
    PRICE_DESK,
    TARGETED,
    Tasks,
    all_tasks,
    difference,
    grouped,
    knowledge,
    title,
    values,
)
from studies.analysis.statistics import Difference, plain
from studies.arms import ARMS, EXCESSIVE, MODERATE


def _against(theirs: str, *ours: str) -> tuple[Pair, ...]:
    return tuple(Pair(arm, theirs) for arm in ours)


_REMEDIES = tuple(
    arm
    for arm, about in ARMS.items()
    if kind_of(arm) in ("other RL", "other SFT") and about.alpha is None and arm in ARMS
)
GROUPS: dict[str, tuple[Pair, ...]] = {
    "other alphas": _against(
        DEFAULT,
        "joint",
        "bargain",
        "auto_nll_100",
        *(f"fusion_{percent}" for percent in range(20, 90, 10) if percent != 40),
        MODERATE,
    ),
    "a reset at a good alpha": (
        *_against(DEFAULT, f"{DEFAULT}_reset"),
        *_against("joint", "joint_reset"),
        *_against("auto_nll_100", "auto_reset_entropy"),
    ),
    "a reset at a large alpha, against random neurons and against none": tuple(
        Pair(f"fusion_{percent}_{ours}", theirs)
        for percent in (60, 70, 80, 100)
        for ours, theirs in (
            ("reset", f"fusion_{percent}_random"),
            ("reset", f"fusion_{percent}" if percent < 100 else EXCESSIVE),
            ("random", f"fusion_{percent}" if percent < 100 else EXCESSIVE),
        )
    ),
    "what keeps facts": (
        *_against(DEFAULT, TARGETED, EMBEDDINGS),
        *_against(TARGETED, EMBEDDINGS, "refit_40", "sft_16"),
        *_against("refit_40", EMBEDDINGS),
    ),
    "refits": _against(DEFAULT, "refit_10", "refit_20", "refit_40", "base_refit_40"),
    "combinations": (
        *_against(
            DEFAULT,
            "fusion_40_refit_10",
            "fusion_40_refit_20",
            "fusion_40_refit_40",
            "fusion_60_refit_20",
            "fusion_70_refit_20",
            "fusion_40_long",
            "fusion_40_of_moderate",
            "fusion_40_of_16",
            "fusion_40_of_32",
        ),
        *_against("refit_20", "fusion_40_refit_20"),
        *_against("refit_40", "fusion_40_refit_40"),
        *_against("fusion_60", "fusion_60_refit_20"),
        *_against("fusion_70", "fusion_70_refit_20"),
    ),
    "other RL and other SFT": _against(DEFAULT, *_REMEDIES),
}
MAIN = (
    EXCESSIVE,
    MODERATE,
    "base",
    DEFAULT,
    f"{DEFAULT}_reset",
    "joint",
    "joint_reset",
    TARGETED,
    EMBEDDINGS,
    "refit_40",
    "fusion_40_refit_20",
    "base_refit_40",
    "sft_kl",
    "dapo",
    "kl_to_base",
    "long_rl",
)


def pair_blocks(tasks: Tasks) -> dict[str, str]:
    """The tables by the name of their place."""
    return {"second pairs": pairs(tasks), "second summary statistics": statistics(tasks)}


def pairs(tasks: Tasks) -> str:
    """Exploratory paired differences in each task and pooled."""
    found = all_tasks(tasks)
    every = list(found.values())
    header = ["difference", *(f"{task.title}, ID" for task in every), "pooled, ID", "pooled, OOD"]
    header.append("price desk: other prices known after RL")
    groups: dict[str, list[list[str]]] = {}
    intervals = 0
    for name, members in GROUPS.items():
        for pair in members:
            made = [
                *(difference([task], pair.ours, pair.theirs) for task in every),
                difference(every, pair.ours, pair.theirs),
                difference(every, pair.ours, pair.theirs, end("ood")),
                difference([found[PRICE_DESK]], pair.ours, pair.theirs, knowledge("end", "unasked")),
            ]
            if any(made):
                intervals += sum(one is not None and one.estimate.low is not None for one in made)
                called = f"`{pair.ours}` {MINUS} `{pair.theirs}`"
                groups.setdefault(name, []).append([called, *map(_cell, made)])
    if not groups:
        return "No pair of arms has been run on a common seed yet."
    about = (
        "These differences are exploratory: nothing is adjusted, and of the "
        f"{intervals} intervals about {round(0.05 * intervals)} would exclude 0 by chance alone. In brackets: "
        f"wins{DASH}losses, and how many seeds have both; pairs without a common seed are left out. "
        "`moderate` is moderate SFT."
    )
    return f"{about}\n\n{table(header, grouped(len(header), groups))}"


def _cell(made: Difference | None) -> str:
    if made is None:
        return NONE
    return f"{signed(plain(made.estimate))} ({made.wins}{DASH}{made.losses}, n = {made.estimate.n})"


def statistics(tasks: Tasks) -> str:
    """Interquartile mean of each main arm over all tasks' runs, and how probable it is that it beats the default."""
    every = list(all_tasks(tasks).values())
    ends = {arm: [list(values(task, arm, end("id")).values()) for task in every] for arm in MAIN}
    rows = []
    for arm, strata in ends.items():
        if not any(strata):
            continue
        better = None if arm == DEFAULT else probability_of_improvement(strata, ends[DEFAULT])
        rows.append(
            [
                title(arm),
                " + ".join(str(len(runs)) for runs in strata),
                interval(plain(interquartile_mean(strata))),
                interval(plain(better)),
            ]
        )
    if not rows:
        return "None of the main arms has been run yet."
    order = " + ".join(task.title.lower() for task in every)
    header = [
        "arm",
        f"runs: {order}",
        "interquartile mean of pass@1, ID",
        f"probability of improvement over `{DEFAULT}`",
    ]
    about = (
        "Intervals are percentiles of bootstraps that draw runs within each task. Interquartile means of arms with "
        "different runs are not comparable; the probability of improvement is the mean over the tasks that "
        "have both arms."
    )
    return f"{table(header, rows)}\n\n{about}"
