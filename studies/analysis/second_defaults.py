"""The plan's rules for the library's defaults, applied to what has been run."""

from __future__ import annotations

from studies.analysis.markdown import listed, number, signed
from studies.analysis.second_values import DEFAULT, PLANNED_N, REFIT, Tasks, all_tasks, difference
from studies.analysis.statistics import Difference

WORSE = 0.05  # by which a default may be worse in one task


def defaults(tasks: Tasks) -> str:
    """One sentence or two for each rule."""
    lines = [
        _rule(tasks, "joint", "Alpha", "`joint` replaces .4", ".4 stays"),
        _rule(
            tasks,
            f"{DEFAULT}_reset",
            "The reset",
            "a reset is on by default",
            "no reset stays the default",
        ),
        _refit(tasks),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _rule(tasks: Tasks, ours: str, name: str, yes: str, no: str) -> str:
    """Better pooled, and in no task worse by more than `WORSE`; a tie goes to what there is."""
    found = all_tasks(tasks)
    single = {task.title: difference([task], ours, DEFAULT) for task in found.values()}
    pooled = difference(list(found.values()), ours, DEFAULT)
    missing = _missing(single)
    about = f"**{name}**: `{ours}` against `{DEFAULT}`"
    if pooled is None:
        return f"{about}: nothing follows yet, {missing}."
    so_far = f"{_plain(pooled)} pooled over the tasks (n = {pooled.estimate.n})"
    ends = listed([f"{title} {_plain(made)}" for title, made in single.items() if made is not None])
    if missing:
        return f"{about}: nothing follows yet, {missing}. So far the difference is {so_far}; {ends}."
    worse = [title for title, made in single.items() if made is not None and made.estimate.value < -WORSE]
    better = pooled.estimate.above
    if better and not worse:
        return (
            f"{about}: {yes}. The difference is {so_far}, and no task is worse by more than {WORSE}: {ends}."
        )
    if better:
        why = f"it is better pooled but worse by more than {WORSE} in {listed(worse)}"
    elif pooled.estimate.below:
        why = "it is worse pooled"
    else:
        why = "the interval of the pooled difference includes 0, and a tie goes to the simpler"
    return f"{about}: {no}, for {why}. The difference is {so_far}; {ends}."


def _refit(tasks: Tasks) -> str:
    """On which tasks a refit is better or worse than the default, by the interval of the paired difference."""
    single = {task.title: difference([task], REFIT, DEFAULT) for task in all_tasks(tasks).values()}
    missing = _missing(single)
    made = {title: found for title, found in single.items() if found is not None}
    about = f"**Refit**: `{REFIT}` against `{DEFAULT}`"
    if not made:
        return f"{about}: nothing follows yet, {missing}."
    sides = {
        "better": [f"{title} ({_plain(found)})" for title, found in made.items() if found.estimate.above],
        "worse": [f"{title} ({_plain(found)})" for title, found in made.items() if found.estimate.below],
    }
    sides["not told apart"] = [
        f"{title} ({_plain(found)})"
        for title, found in made.items()
        if not found.estimate.above and not found.estimate.below
    ]
    told = "; ".join(f"{word} on {listed(titles)}" for word, titles in sides.items() if titles)
    if missing:
        return f"{about}: nothing follows yet, {missing}. So far it is {told}."
    return f"{about}: it is named beside the default in the README, {told}."


def _missing(single: dict[str, Difference | None]) -> str:
    """Which tasks lack seeds, in words; empty if none does."""
    counts = {title: found.estimate.n if found is not None else 0 for title, found in single.items()}
    few = [f"{title} has {n} of {PLANNED_N} pairs" for title, n in counts.items() if n < PLANNED_N]
    return f"runs are missing: {listed(few)}" if few else ""


def _plain(found: Difference) -> str:
    estimate = found.estimate
    if estimate.low is None:
        return number(estimate.value, sign=True)
    return signed(estimate._asdict()).replace("**", "")
