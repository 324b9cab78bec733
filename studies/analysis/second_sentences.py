"""The second edition in a sentence or two, for README and the opening of docs/evidence.md."""

from __future__ import annotations

from studies.analysis.markdown import listed, signed
from studies.analysis.results import end
from studies.analysis.second_values import (
    DEFAULT,
    EMBEDDINGS,
    NOT_YET,
    PLANNED_N,
    PRICE_DESK,
    REFIT,
    TARGETED,
    TITLES,
    Tasks,
    all_tasks,
    average,
    count,
    difference,
    knowledge,
    successes,
)
from studies.arms import EPOCHS, EXCESSIVE, MODERATE

ROWS = {
    EXCESSIVE: TITLES[EXCESSIVE],
    MODERATE: TITLES[MODERATE],
    REFIT: "a refit",
    DEFAULT: "fusion at 0.4",
    TARGETED: "fusion at 0.7 with a reset",
    EMBEDDINGS: "fusion at 0.4 that keeps the input embeddings",
}
KNOWN = {
    EXCESSIVE: "excessive SFT",
    DEFAULT: "fusion at 0.4",
    "fusion_70": "fusion at 0.7",
    TARGETED: "the same with the reset",
    REFIT: "the refit",
    EMBEDDINGS: "fusion at 0.4 that keeps the input embeddings",
    "base": "the base, by chance,",
}
CONTROLS = {"fusion_70_random": "as many random neurons", "fusion_70": "no reset"}


def sentence_blocks(tasks: Tasks) -> dict[str, str]:
    """Parts of sentences by the name of their place."""
    return {
        "second successes": counts(tasks),
        "second refit": beside_default(tasks, REFIT, "a refit of 40 steps"),
        "second embeddings": beside_default(
            tasks, EMBEDDINGS, "fusion at 0.4 that keeps the input embeddings"
        ),
        "second targeted": targeted(tasks),
        "second facts": facts(tasks),
        "second reset and refit": reset_and_refit(tasks),
        "second rungs": rungs(tasks),
    }


def counts(tasks: Tasks) -> str:
    """How many seeds succeed from each of four starts, task by task."""
    parts = []
    for task in all_tasks(tasks).values():
        found = {name: successes(task, arm) for arm, name in ROWS.items()}
        known = [f"{name} {count}" for name, count in found.items() if count != NOT_YET]
        parts.append(f"{task.title.lower()}: {listed(known) or NOT_YET}")
    return "; ".join(parts)


def targeted(tasks: Tasks) -> str:
    """What targeted neurons do at the price desk beside random ones and beside none."""
    parts = []
    for control, name in CONTROLS.items():
        made = difference([all_tasks(tasks)[PRICE_DESK]], TARGETED, control)
        if made is not None and made.estimate.low is not None:
            text = signed(made.estimate._asdict()).replace("**", "")
            parts.append(f"{text} against {name} (n = {made.estimate.n})")
    return listed(parts) or "not run yet"


def facts(tasks: Tasks) -> str:
    """How many of all prices that SFT teaches are known before RL, from each start that has been run."""
    desk = all_tasks(tasks)[PRICE_DESK]
    found = [
        f"{name} {average(desk, arm, knowledge('start', 'new'))}"
        for arm, name in KNOWN.items()
        if count(desk, arm)
    ]
    return listed(found) or NOT_YET


def rungs(tasks: Tasks) -> str:
    """How many seeds succeed at the price desk from each rung of SFT that has been run."""
    desk = all_tasks(tasks)[PRICE_DESK]
    found = [
        f"{successes(desk, arm)} after {epochs} epoch{'s' * (epochs > 1)}"
        for epochs in EPOCHS
        if count(desk, arm := f"sft_{epochs}")
    ]
    return listed(found) or NOT_YET


def reset_and_refit(tasks: Tasks) -> str:
    """The reset at a larger alpha minus the refit, at the price desk."""
    desk = all_tasks(tasks)[PRICE_DESK]
    parts = []
    for split, name in (("id", "in distribution"), ("ood", "out of it")):
        made = difference([desk], TARGETED, REFIT, end(split))
        if made is not None and made.estimate.low is not None:
            text = signed(made.estimate._asdict()).replace("**", "")
            parts.append(f"{text} {name}")
    return f"{listed(parts)} (n = {count(desk, REFIT)})" if parts else NOT_YET


def beside_default(tasks: Tasks, arm: str, name: str) -> str:
    """On which tasks an arm ends above the default, by the interval of the paired difference, and on which below.

    Args:
        tasks: The results.
        arm: The arm.
        name: What it is called in the sentence.
    """
    words = {
        "above": f"{name} ends higher than fusion at 0.4 on",
        "below": "lower on",
        "undecided": "not told apart on",
    }
    sides: dict[str, list[str]] = {side: [] for side in words}
    for task in all_tasks(tasks).values():
        made = difference([task], arm, DEFAULT)
        if made is None or made.estimate.low is None:
            continue
        estimate = made.estimate
        side = "above" if estimate.above else "below" if estimate.below else "undecided"
        text = signed(estimate._asdict()).replace("**", "")
        so_far = "" if estimate.n >= PLANNED_N else " so far"
        sides[side].append(f"the {task.title.lower()} ({text}, n = {estimate.n}{so_far})")
    found = {side: listed(titles) for side, titles in sides.items() if titles}
    if not found:
        return f"{name} and fusion at 0.4 have not been run beside each other yet"
    if "above" not in found:
        words["below"] = words["above"].replace("higher", "lower")
    if found.keys() == {"undecided"}:
        words["undecided"] = f"{name} and fusion at 0.4 are not told apart on"
    return ", ".join(f"{words[side]} {titles}" for side, titles in found.items())
