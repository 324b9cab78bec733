"""The tables of the pages of evidence about outcomes and about alpha."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from studies.analysis.checks import DEFAULT, EARLIER, NAMED, REMEDIES
from studies.analysis.markdown import (
    DASH,
    MINUS,
    NONE,
    interval,
    number,
    of,
    plus_minus,
    seed_ranges,
    signed,
    table,
)
from studies.analysis.results import PLANNED
from studies.arms import ARMS, EXCESSIVE, RIGID_ALPHA

Summary = Mapping[str, Any]
SPLITS = {"id": "ID", "ood": "OOD"}
FIXED = {f"fusion_{percent}": percent / 100 for percent in range(10, 100, 10)}
RULES = tuple(arm for arm, about in ARMS.items() if about.group == "alpha")


def outcome_blocks(summary: Summary) -> dict[str, str]:
    """Tables by the name of their place in the page."""
    return {
        "main": both_table(summary),
        **{f"main {name}": main_table(task) for name, task in summary["tasks"].items()},
        **{f"arms {name}": arms_table(task) for name, task in summary["tasks"].items()},
        "seeds": seeds_table(summary),
        "alpha": alpha_table(summary),
        "rules": rules_table(summary),
        "rules paired": rules_paired_table(summary),
    }


def title(arm: str) -> str:
    """The arm in words, with its name in the raw results."""
    return f"{ARMS[arm].title} (`{arm}`)"


def seeds_table(summary: Summary) -> str:
    """Which seeds are reported and which lie there from tuning, and how far each task has come."""
    rows = [
        [
            task["title"],
            f"{seed_ranges(task['seeds'])} ({len(task['seeds'])})",
            seed_ranges(task["tuning_seeds"]) or NONE,
            str(len(task["arms"])),
            str(len(PLANNED)),
            str(sum(row["n"] for row in task["arms"].values())),
            number(task["tokens_per_response"], 1),
        ]
        for task in summary["tasks"].values()
    ]
    header = [
        "task",
        "reported seeds",
        "tuning seeds",
        "arms run",
        "of",
        "runs of RL",
        "tokens a response of the base",
    ]
    return table(header, rows)


def arms_table(task: Summary) -> str:
    """Every arm of a task: the outcome that counts and what it started from."""
    header = ["arm", "n", "ID start → end", "ID gain", "OOD start → end", "successes", "reward AUC"]
    return table(header, [[title(arm), *_arm_cells(row)] for arm, row in task["arms"].items()])


def _arm_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["n"]),
        _from_to(row["id"]),
        number(row["id"]["gain"]["value"], sign=True),
        _from_to(row["ood"]),
        of(row["successes"], row["n"]),
        plus_minus(row["reward_auc"]),
    ]


def _from_to(row: Mapping[str, Any]) -> str:
    return f"{number(row['start']['value'])} → {plus_minus(row['end'])}"


def main_table(task: Summary) -> str:
    """The arms of the claim."""
    header = [
        "RL from",
        "n",
        "ID start → end",
        "ID gain",
        "OOD start → end",
        "successes",
        "success rate",
        "reward AUC",
    ]
    rows = []
    for arm, name in claim_arms():
        row = task["arms"].get(_in_task(arm, task))
        if row is not None:
            cells = _arm_cells(row)
            rows.append(
                [name.format(_in_task(arm, task)), *cells[:-1], interval(row["success_rate"]), cells[-1]]
            )
    return table(header, rows)


def both_table(summary: Summary) -> str:
    """The arms of the claim on all tasks beside one another: where they end, and how many seeds succeed."""
    tasks = summary["tasks"].values()
    header = ["RL from"]
    for task in tasks:
        header += [f"{task['title']}: ID start → end", "OOD end", "successes"]
    rows = []
    for arm, name in claim_arms():
        cells: list[str] = []
        for task in tasks:
            row = task["arms"].get(_in_task(arm, task))
            if row is None:
                cells += [NONE] * 3
                continue
            cells += [_from_to(row["id"]), plus_minus(row["ood"]["end"]), of(row["successes"], row["n"])]
        if set(cells) != {NONE}:
            names = dict.fromkeys(_in_task(arm, task) for task in tasks)
            rows.append([name.format("`, `".join(names)), *cells])
    return table(header, rows)


def claim_arms() -> list[tuple[str, str]]:
    """The arms of the claim with their titles; "moderate" stands for another checkpoint in each task.

    The titles of it and of "excessive" have a place for its name in the raw results.
    """
    arms = ["base", "moderate", *EARLIER, "excessive", *REMEDIES, "fusion_30", *NAMED, DEFAULT]
    names = {"moderate": "moderate SFT (`{}`)", "excessive": "excessive SFT (`{}`)"}
    return [(arm, names.get(arm) or title(arm)) for arm in arms]


def _in_task(arm: str, task: Summary) -> str:
    return task[arm] if arm in ("moderate", "excessive") else arm


def alpha_table(summary: Summary) -> str:
    """End points over alpha of the excessive checkpoint, from the base (0) to itself (1)."""
    header = ["alpha"]
    for task in summary["tasks"].values():
        header += [f"{task['title']}: n", "ID start → end", "OOD end", "successes", "support, nats"]
    rows = []
    for alpha in (0.0, *FIXED.values(), 1.0):
        cells: list[str] = []
        for name, task in summary["tasks"].items():
            row = task["arms"].get(arm_of_alpha(alpha, name))
            if row is None:
                cells += [NONE] * 5
                continue
            cells += [
                str(row["n"]),
                _from_to(row["id"]),
                plus_minus(row["ood"]["end"]),
                of(row["successes"], row["n"]),
                number(row["measures"].get("support")),
            ]
        rows.append([f"{alpha:.1f}", *cells])
    return table(header, rows)


def arm_of_alpha(alpha: float, task: str) -> str:
    """The arm that is fusion at a fixed alpha; that of the rigid arms has another name and runs earlier."""
    names = {0.0: "base", RIGID_ALPHA[task]: "rigid", 1.0: EXCESSIVE}
    return names.get(alpha, f"fusion_{round(100 * alpha)}")


def rules_table(summary: Summary) -> str:
    """What each automatic rule picks, and what comes of it."""
    header = ["rule"]
    for task in summary["tasks"].values():
        header += [f"{task['title']}: n", "alpha (range)", "ID end", "OOD end", "successes"]
    rows = []
    for arm in [*RULES, "fusion_30", "fusion_40", "fusion_50"]:
        cells: list[str] = []
        for task in summary["tasks"].values():
            row = task["arms"].get(arm)
            if row is None:
                cells += [NONE] * 5
                continue
            cells += [
                str(row["n"]),
                _alpha(row["alpha"]),
                plus_minus(row["id"]["end"]),
                plus_minus(row["ood"]["end"]),
                of(row["successes"], row["n"]),
            ]
        if set(cells) != {NONE}:
            rows.append([title(arm), *cells])
    return table(header, rows)


def _alpha(alpha: Mapping[str, float] | None) -> str:
    if alpha is None:
        return NONE
    if alpha["low"] == alpha["high"]:
        return number(alpha["mean"])
    return f"{number(alpha['mean'])} ({number(alpha['low'])}{DASH}{number(alpha['high'])})"


def rules_paired_table(summary: Summary) -> str:
    """Each rule minus the default one, seed by seed."""
    return paired_table(summary, summary["rules"])


def paired_table(summary: Summary, comparisons: Iterable[Mapping[str, Any]], questions: bool = False) -> str:
    """Paired differences: a row for each pair, columns for the end point in each task and for all outcomes pooled."""
    tasks = summary["tasks"]
    found: dict[tuple[str, str], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in comparisons:
        found.setdefault((row["ours"], row["theirs"]), {})[row["task"], row["outcome"]] = row
    columns = [(name, "id", f"{task['title']}, ID") for name, task in tasks.items()]
    if len(tasks) > 1:
        columns += [
            ("all", "id", "both, ID"),
            ("all", "ood", "both, OOD"),
            ("all", "auc", "both, reward AUC"),
        ]
    else:
        columns += [(name, outcome, outcome.upper()) for name in tasks for outcome in ("ood", "auc")]
    rows = []
    for (ours, theirs), outcomes in found.items():
        question = next(iter(outcomes.values()))["question"] if questions else ""
        cells = [_difference(outcomes.get((name, outcome))) for name, outcome, _ in columns]
        rows.append([f"`{ours}` {MINUS} `{theirs}`" + (f": {question}" if question else ""), *cells])
    return table(["difference", *[called for *_, called in columns]], rows)


def _difference(row: Mapping[str, Any] | None) -> str:
    """A paired difference with the seeds that it is positive and negative in."""
    return NONE if row is None else f"{signed(row)} ({row['wins']}{DASH}{row['losses']})"
