"""What the first edition says, in few sentences whose words depend on the numbers: for README and the appendix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.analysis.checks import DEFAULT, NAMED, REMEDIES
from studies.analysis.comparisons import SECOND, THIRD, Family
from studies.analysis.forecast_tables import areas, ranked
from studies.analysis.markdown import listed, number, of, seed_ranges
from studies.analysis.requirements import checks_of, met
from studies.arms import ARMS, SECOND_SEEDS

Summary = Mapping[str, Any]
NAMES = {
    "auto_nll_100": "the automatic alpha alone",
    "auto_reset": "the automatic alpha with the reset of the target logit's neurons",
}


def brief(summary: Summary) -> list[str]:
    """The sentences, those without data left out."""
    lines = [_rescue(task) for task in summary["tasks"].values()]
    lines += [_requirements(summary), _third(summary), _second(summary)]
    lines += [_targeted(summary), _at_a_good_alpha(summary)]
    lines += [_forecast(summary)]
    return [line for line in lines if line]


def headline(summary: Summary) -> str:
    """For README: how many seeds succeed, both tasks together, on the fresh ones first."""
    tasks = summary["tasks"].values()
    parts = []
    for name, of_task in (
        ("excessive SFT", lambda task: task["excessive"]),
        ("moderate SFT", lambda task: task["moderate"]),
        ("fusion at 0.4", lambda task: "fusion_40"),
        (f"fusion and a reset (`{DEFAULT}`)", lambda task: DEFAULT),
    ):
        counts = []
        for key in ("fresh", "arms"):
            rows = [task[key][of_task(task)] for task in tasks if of_task(task) in task[key]]
            if rows:
                good, n = (sum(row[count] for row in rows) for count in ("successes", "n"))
                counts.append(f"{good} of {n}")
        if len(counts) == 2:
            fresh, whole = counts
            parts.append(f"{name} in {fresh}" + (f" ({whole} on all seeds)" if whole != fresh else ""))
    return listed(parts) or "no start yet"


def tokens(summary: Summary) -> str:
    """Mean length of the base's responses, task by task."""
    found = [task["tokens_per_response"] for task in summary["tasks"].values()]
    return f"{listed([number(value, 1) for value in found])} tokens"


def paper_rule(summary: Summary) -> str:
    """The source paper's neurons against as many random ones, on the end point: a difference for each task."""
    parts = [
        f"{number(row['value'], sign=True)} ({summary['tasks'][row['task']]['title'].lower()}, n = {row['n']})"
        for row in summary["confirmatory"]
        if (row["ours"], row["theirs"], row["outcome"]) == ("rigid_paper", "rigid_paper_random", "id")
        and row["task"] != "all"
    ]
    return listed(parts) or "not run yet"


def _rescue(task: Mapping[str, Any]) -> str:
    """Where RL ends from the starts that a reader knows, and from the best remedy within RL."""
    arms = task["arms"]
    if DEFAULT not in arms or task["excessive"] not in arms:
        return ""
    others = {"moderate SFT": task["moderate"], "the base": "base"}
    run = [arm for arm in REMEDIES if arm in arms]
    if run:
        best = max(run, key=lambda arm: arms[arm]["id"]["end"]["value"])
        others[f"the best remedy within RL ({ARMS[best].title})"] = best
    ends = [f"{_end(arms[arm])} from {name}" for name, arm in others.items() if arm in arms]
    ours = arms[DEFAULT]
    beside = f"; {listed(ends)}" if ends else ""
    return (
        f"**{task['title']}.** RL from excessive SFT ends at {_end(arms[task['excessive']])}, rejuvenated first at "
        f"{_end(ours)}{beside}. Out of distribution, rejuvenated: {number(ours['ood']['end']['value'])}."
    )


def _end(row: Mapping[str, Any]) -> str:
    return f"{number(row['id']['end']['value'])} ({of(row['successes'], row['n'])} seeds succeed)"


def _requirements(summary: Summary) -> str:
    """How many of the requirements each form of the method meets."""
    fresh = f"the default on seeds {seed_ranges(SECOND_SEEDS)} alone"
    found = {
        "the default": met(checks_of(summary, DEFAULT)),
        fresh: met(checks_of(summary, DEFAULT, fresh=True)),
        **{NAMES[arm]: met(checks_of(summary, arm)) for arm in NAMED},
    }
    parts = [f"{name} meets {passed} of {decided}" for name, (passed, decided) in found.items() if decided]
    if not parts:
        return ""
    return f"**What was to be reached** ([set beforehand](#what-it-must-reach)): {listed(parts)}."


def _targeted(summary: Summary) -> str:
    """The target logit's neurons against their two controls where alpha is too large."""
    found = {
        "a random reset of the same count": _apart(summary, "rigid_reset", "rigid_random"),
        "a smaller alpha of equal support": _apart(summary, "rigid_reset", "rigid_equal_support"),
    }
    parts = [f"against {control}: {words}" for control, words in found.items() if words]
    return f"**Neurons by target logit, where alpha is too large**, {'; '.join(parts)}." if parts else ""


def _at_a_good_alpha(summary: Summary) -> str:
    words = _apart(summary, "auto_reset", "auto_nll_100")
    return f"**The same at the automatic alpha**, against fusion alone: {words}." if words else ""


def _third(summary: Summary) -> str:
    """The decision on fresh seeds."""
    parts = _pooled(summary, "third", THIRD)
    if not parts:
        return ""
    return (
        "**Neurons by entropy gradient**, the default, tested on seeds that ran after it had been chosen "
        f"({seed_ranges(THIRD.seeds)}), both tasks pooled: {'; '.join(parts)}."
    )


def _second(summary: Summary) -> str:
    """What the first seeds suggested, on the later ones of the first set."""
    parts = _pooled(summary, "second", SECOND)
    if not parts:
        return ""
    return (
        "**The same before it was the default**, suggested by the first seeds and tested on seeds "
        f"{seed_ranges(SECOND.seeds)}, both tasks pooled: {'; '.join(parts)}."
    )


def _pooled(summary: Summary, key: str, family: Family) -> list[str]:
    """What became of each pair of a family that is tested on both tasks pooled."""
    parts = []
    for pair in family.pairs:
        for row in summary[key]:
            if (row["ours"], row["theirs"]) == pair[:2] and row["p_holm"] is not None:
                difference = f"{number(row['value'], sign=True)}, n = {row['n']}"
                parts.append(f"{pair.question}: {_word(row)} ({difference})")
    return parts


def _word(row: Mapping[str, Any]) -> str:
    above = "above" if row["value"] > 0 else "below"
    return above if row["p_holm"] < 0.05 else "not told apart"


def _apart(summary: Summary, ours: str, theirs: str) -> str:
    """Whether a confirmatory comparison is told apart after Holm's adjustment, task by task."""
    parts = []
    for row in summary["confirmatory"]:
        if (row["ours"], row["theirs"], row["outcome"]) != (ours, theirs, "id") or row["p_holm"] is None:
            continue
        task = summary["tasks"][row["task"]]["title"].lower()
        parts.append(f"{task} {_word(row)} ({number(row['value'], sign=True)})")
    return listed(parts)


def _forecast(summary: Summary) -> str:
    """The measure that tells best on held-out seeds, and how well support does."""
    order = ranked(summary, "over_trained")
    support = [measure for measure in order if measure == "support"]
    parts = [areas(summary, "over_trained", measure) for measure in dict.fromkeys([*order[:1], *support])]
    known = [part for part in parts if part]
    if not known:
        return ""
    which = "the best measure and support" if len(known) > 1 else "the best measure"
    return f"**Forecast before RL**, ROC-AUC on held-out seeds, {which}: {'; '.join(known)}."
