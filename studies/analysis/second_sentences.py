"""The second edition in a sentence or two, for README and the opening of docs/evidence.md."""

from __future__ import annotations

from studies.analysis.markdown import listed, signed
from studies.analysis.second_values import (
    DEFAULT,
    NOT_YET,
    PRICE_DESK,
    TARGETED,
    TITLES,
    Tasks,
    all_tasks,
    difference,
    successes,
)
from studies.arms import EXCESSIVE, MODERATE

REFIT = "refit_40"
ROWS = {
    EXCESSIVE: TITLES[EXCESSIVE],
    MODERATE: TITLES[MODERATE],
    REFIT: "a refit",
    DEFAULT: "fusion at 0.4",
    TARGETED: "fusion at 0.7 with a reset",
}
CONTROLS = {"fusion_70_random": "as many random neurons", "fusion_70": "no reset"}


def sentence_blocks(tasks: Tasks) -> dict[str, str]:
    """Parts of sentences by the name of their place."""
    return {
        "second successes": counts(tasks),
        "second refit": beside_default(tasks, REFIT, "a refit of 40 steps"),
        "second reset": beside_default(tasks, TARGETED, "fusion at 0.7 with a reset of 4 %"),
        "second targeted": targeted(tasks),
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
        sides[side].append(f"the {task.title.lower()} ({text}, n = {estimate.n})")
    found = {side: listed(titles) for side, titles in sides.items() if titles}
    if not found:
        return f"{name} and fusion at 0.4 have not been run beside each other yet"
    if "above" not in found:
        words["below"] = words["above"].replace("higher", "lower")
    if found.keys() == {"undecided"}:
        words["undecided"] = f"{name} and fusion at 0.4 are not told apart on"
    return ", ".join(f"{words[side]} {titles}" for side, titles in found.items())
