"""The second edition in a sentence or two, for README and the opening of docs/evidence.md."""

from __future__ import annotations

from studies.analysis.markdown import listed, signed
from studies.analysis.second_values import DEFAULT, NOT_YET, TITLES, Tasks, all_tasks, difference, successes
from studies.arms import EXCESSIVE, MODERATE

REFIT = "refit_40"
ROWS = {EXCESSIVE: TITLES[EXCESSIVE], MODERATE: TITLES[MODERATE], REFIT: "a refit", DEFAULT: "fusion at 0.4"}
WORDS = {
    "above": "a refit of 40 steps ends higher than fusion at 0.4 on",
    "below": "lower on",
    "undecided": "not told apart on",
}


def sentence_blocks(tasks: Tasks) -> dict[str, str]:
    """Parts of sentences by the name of their place."""
    return {"second successes": counts(tasks), "second refit": refit(tasks)}


def counts(tasks: Tasks) -> str:
    """How many seeds succeed from each of four starts, task by task."""
    parts = []
    for task in all_tasks(tasks).values():
        found = {name: successes(task, arm) for arm, name in ROWS.items()}
        known = [f"{name} {count}" for name, count in found.items() if count != NOT_YET]
        parts.append(f"{task.title.lower()}: {listed(known) or NOT_YET}")
    return "; ".join(parts)


def refit(tasks: Tasks) -> str:
    """On which tasks the refit ends above the default, by the interval of the paired difference, and on which below."""
    sides: dict[str, list[str]] = {side: [] for side in WORDS}
    for task in all_tasks(tasks).values():
        made = difference([task], REFIT, DEFAULT)
        if made is None or made.estimate.low is None:
            continue
        estimate = made.estimate
        side = "above" if estimate.above else "below" if estimate.below else "undecided"
        text = signed(estimate._asdict()).replace("**", "")
        sides[side].append(f"the {task.title.lower()} ({text}, n = {estimate.n})")
    found = {side: listed(titles) for side, titles in sides.items() if titles}
    if not found:
        return "a refit and fusion have not been run beside each other yet"
    words = {
        **WORDS,
        "below": WORDS["below"] if "above" in found else WORDS["above"].replace("higher", "lower"),
    }
    if found.keys() == {"undecided"}:
        words["undecided"] = "a refit of 40 steps and fusion at 0.4 are not told apart on"
    return ", ".join(f"{words[side]} {titles}" for side, titles in found.items())
