"""Every arm of the second edition in a row: by what is done to the model, and along the price desk's frontier."""

from __future__ import annotations

from studies.analysis.markdown import NONE, interval, listed, table
from studies.analysis.results import SECOND_EDITION, Of, TaskResults, auc, end, start, succeeded
from studies.analysis.second_values import (
    PRICE_DESK,
    Tasks,
    all_tasks,
    average,
    count,
    grouped,
    knowledge,
    rate,
    successes,
    title,
    values,
    with_interval,
)
from studies.analysis.statistics import plain, success_rate
from studies.arms import ARMS, MODERATE_EPOCHS
from studies.passes import passes

KINDS = ("no edit", "edits", "refits", "other SFT", "other RL")
RUNGS = ("base", "sft_4", "sft_8", "sft_16", "sft_32", "sft_64")
FRONTIER = {
    "rungs of SFT": RUNGS,
    "fusion": (*(f"fusion_{percent}" for percent in range(20, 90, 10)), "fusion_40_embeddings"),
    "resets of targeted neurons": (
        "fusion_40_reset",
        "fusion_60_reset",
        "fusion_70_reset",
        "fusion_80_reset",
        "fusion_100_reset",
    ),
    "resets of random neurons": (
        "fusion_60_random",
        "fusion_70_random",
        "fusion_80_random",
        "fusion_100_random",
    ),
    "refits": ("refit_10", "refit_20", "refit_40", "base_refit_40"),
    "fusion and a refit": (
        "fusion_40_refit_10",
        "fusion_40_refit_20",
        "fusion_40_refit_40",
        "fusion_60_refit_20",
        "fusion_70_refit_20",
    ),
    "rules for alpha": ("joint", "joint_reset", "bargain", "auto_nll_100", "auto_reset_entropy"),
    "fusion of another rung": ("fusion_40_of_moderate", "fusion_40_of_16", "fusion_40_of_32"),
    "other SFT": ("sft_kl", "sft_replay"),
}


def row_blocks(tasks: Tasks) -> dict[str, str]:
    """The tables by the name of their place."""
    return {
        **{f"second remedies {name}": remedies(task) for name, task in all_tasks(tasks).items()},
        "second frontier": frontier(tasks),
    }


def kind_of(arm: str) -> str:
    """What is done to the model: the last thing that is done decides."""
    about = ARMS[arm]
    if about.remedy is not None:
        return "other RL"
    if about.sft is not None:
        return "other SFT"
    if about.refit_steps:
        return "refits"
    return "no edit" if about.alpha is None else "edits"


def remedies(task: TaskResults) -> str:
    """Every arm of the passes core and remedies."""
    planned = [
        arm
        for of_pass in passes(task.name, SECOND_EDITION.groups)
        if of_pass.name in ("core", "remedies")
        for arm in of_pass.arms
    ]
    header = [
        "arm",
        "n",
        "ID start → end",
        "OOD end",
        "successes",
        "success rate",
        "mean reward during RL",
        "responses",
        "gradient steps",
        "training steps before RL",
    ]
    groups = {
        kind: [
            _remedy(task, arm) for arm in ARMS if arm in planned and kind_of(arm) == kind and count(task, arm)
        ]
        for kind in KINDS
    }
    if not any(groups.values()):
        return f"{task.title}: no arm has been run yet."
    note = "Training steps before RL are those of a refit or of other SFT; those of the ladder's SFT do not count."
    return f"{table(header, grouped(len(header), groups))}\n\n{note}{_missing(task, planned)}"


def _remedy(task: TaskResults, arm: str) -> list[str]:
    wins = [bool(won) for won in values(task, arm, succeeded).values()]
    return [
        title(arm),
        str(count(task, arm)),
        f"{average(task, arm, start('id'))} → {with_interval(task, arm, end('id'))}",
        with_interval(task, arm, end("ood")),
        successes(task, arm),
        interval(plain(success_rate(sum(wins), len(wins)))),
        average(task, arm, auc),
        *(
            average(task, arm, _field(name), digits=0)
            for name in ("rl_responses", "gradient_steps", "training_steps_before_rl")
        ),
    ]


def _field(name: str) -> Of:
    return lambda record: record[name]


def _missing(task: TaskResults, planned: list[str] | tuple[str, ...]) -> str:
    """Which of the planned arms no seed has yet."""
    missing = [f"`{arm}`" for arm in planned if not count(task, arm)]
    return f" Not run yet: {listed(missing)}." if missing else ""


def frontier(tasks: Tasks) -> str:
    """The price desk: what each start knows and how often it reads, before and after RL."""
    desk = all_tasks(tasks)[PRICE_DESK]
    header = [
        "RL from",
        "n",
        "prices RL asks for, known",
        "other prices, known",
        "careful style",
        "form before RL",
        "ID end",
        "OOD end",
        "successes",
    ]
    groups = {
        name: [_start(desk, arm) for arm in arms if count(desk, arm)] for name, arms in FRONTIER.items()
    }
    if not any(groups.values()):
        return f"{desk.title}: no arm has been run yet."
    every = [arm for arms in FRONTIER.values() for arm in arms]
    note = (
        "Prices known and careful style (the share of requests that are read first) are before → after RL. "
        f"Moderate SFT is `sft_{MODERATE_EPOCHS[PRICE_DESK]}`; `base` is fusion with alpha 0, `sft_64` with alpha 1."
    )
    return f"{table(header, grouped(len(header), groups))}\n\n{note}{_missing(desk, every)}"


def _start(desk: TaskResults, arm: str) -> list[str]:
    def from_to(before: Of, after: Of, digits: int = 2) -> str:
        ends = [average(desk, arm, of_record, digits) for of_record in (before, after)]
        return NONE if NONE in ends else " → ".join(ends)

    return [
        title(arm),
        str(count(desk, arm)),
        from_to(knowledge("start", "asked"), knowledge("end", "asked")),
        from_to(knowledge("start", "unasked"), knowledge("end", "unasked")),
        from_to(rate("style_rate"), rate("style_rate", "end"), 3),
        average(desk, arm, rate("form_rate")),
        with_interval(desk, arm, end("id")),
        with_interval(desk, arm, end("ood")),
        successes(desk, arm),
    ]
