"""What was to be reached, set before the study: tables and sentences about whether it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from studies.analysis.checks import DEFAULT, NAMED, REJUVENATED
from studies.analysis.markdown import DASH, NONE, listed, number, of, plus_minus, seed_ranges, signed, table
from studies.analysis.tables import SPLITS, Summary, title
from studies.arms import ARMS, SECOND_SEEDS

Row = Mapping[str, Any]
SUCCEEDING = (
    DEFAULT,
    "auto_nll_100",
)  # the default automatic alpha, with the default's reset and without one


def requirement_blocks(summary: Summary) -> dict[str, str]:
    """Tables and sentences by the name of their place in the page."""
    lines = [_targets(summary, DEFAULT), _fresh_targets(summary)]
    lines += [_targets(summary, arm) for arm in NAMED]
    lines += [_successes(summary)]
    return {
        **{f"checks {ours}": checks_table(summary, ours) for ours in REJUVENATED},
        "checks fresh": checks_table(summary, DEFAULT, fresh=True),
        "findings targets": "\n".join(f"- {line}" for line in lines if line),
    }


def checks_of(summary: Summary, ours: str, fresh: bool = False) -> list[Row]:
    """The requirements on one arm, over all seeds or on the second set of seeds alone."""
    return [row for row in summary["checks"] if row["ours"] == ours and row["fresh"] is fresh]


def met(rows: Iterable[Row]) -> tuple[int, int]:
    """How many requirements are met, and how many are decided."""
    decided = [row["passed"] for row in rows if row["passed"] is not None]
    return sum(decided), len(decided)


def checks_table(summary: Summary, ours: str, fresh: bool = False) -> str:
    """What was to be reached by one rejuvenated arm: paired differences of end points, and whether they pass."""
    columns = [(name, split) for name in summary["tasks"] for split in SPLITS]
    header = ["minus", *[f"{summary['tasks'][name]['title']}, {SPLITS[split]}" for name, split in columns]]
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for check in checks_of(summary, ours, fresh):
        role = "moderate" if not check["strict"] else check["theirs"]
        found.setdefault(role, {})[check["task"], check["split"]] = check
    order = ["moderate", *[role for role in found if role != "moderate"]]
    rows = [
        [
            f"{_moderate(summary)} (at least as good)" if role == "moderate" else title(role),
            *[_check(found[role].get(column)) for column in columns],
        ]
        for role in order
        if role in found
    ]
    return table(header, rows)


def _moderate(summary: Summary) -> str:
    """Moderate SFT with its names in the raw results, which differ from task to task.

    >>> _moderate({"tasks": {"a": {"moderate": "sft_8"}, "b": {"moderate": "sft_2"}}})
    'moderate SFT (`sft_8`, `sft_2`)'
    """
    names = dict.fromkeys(f"`{task['moderate']}`" for task in summary["tasks"].values())
    return f"moderate SFT ({', '.join(names)})"


def _check(check: Row | None) -> str:
    if check is None:
        return NONE
    if check["passed"] is None:
        return f"{signed(check)} (1) undecided"
    uncertain = check["passed"] and check["strict"] and (check["p_holm"] is None or check["p_holm"] >= 0.05)
    word = ("pass†" if uncertain else "pass") if check["passed"] else "**fail**"
    counts = f"{check['wins']}{DASH}{check['losses']} of {check['n']}"
    return f"{signed(check)} ({counts}) {word}"


def _targets(summary: Summary, arm: str) -> str:
    """Where one form of the method ends over all seeds, and what it fails."""
    ends = {
        name: (task["arms"][arm]["n"], *(task["arms"][arm][split]["end"] for split in SPLITS))
        for name, task in summary["tasks"].items()
        if arm in task["arms"]
    }
    words = _met(summary, checks_of(summary, arm))
    return f"**{ARMS[arm].title}** (`{arm}`) ends at {_ends(summary, ends)}: {words}." if words else ""


def _fresh_targets(summary: Summary) -> str:
    """The same of the default on the seeds that ran after it had become the default."""
    ends = {
        name: (task["fresh"][DEFAULT]["n"], *(task["fresh"][DEFAULT][split] for split in SPLITS))
        for name, task in summary["tasks"].items()
        if DEFAULT in task["fresh"]
    }
    words = _met(summary, checks_of(summary, DEFAULT, fresh=True))
    if not words:
        return ""
    return (
        f"The same on seeds {seed_ranges(SECOND_SEEDS)} alone, which ran after it had become the default, ends at "
        f"{_ends(summary, ends)}: {words}."
    )


def _ends(summary: Summary, ends: Mapping[str, tuple[int, Row, Row]]) -> str:
    return listed(
        [
            f"{plus_minus(inside)} ID and {plus_minus(outside)} OOD "
            f"({summary['tasks'][name]['title'].lower()}, n = {n})"
            for name, (n, inside, outside) in ends.items()
        ]
    )


def _met(summary: Summary, checks: list[Row]) -> str:
    passed, decided = met(checks)
    if not decided:
        return ""
    failed = [
        f"`{check['theirs']}` ({summary['tasks'][check['task']]['title'].lower()}, {check['split'].upper()}: "
        f"{number(check['value'], sign=True)} [{number(check['low'])}, {number(check['high'])}])"
        for check in checks
        if check["passed"] is False
    ]
    verdict = f"; it fails against {listed(failed)}" if failed else ""
    return f"{passed} of {decided} comparisons passed{verdict}"


def _successes(summary: Summary) -> str:
    """Whether every seed succeeds with the default automatic alpha, over all seeds and on the second set."""
    parts, whole = _counted(summary, "arms")
    if not parts:
        return ""
    fresh, _ = _counted(summary, "fresh")
    alone = f"; on seeds {seed_ranges(SECOND_SEEDS)} alone {listed(fresh)}" if fresh else ""
    word = "yes" if whole else "no"
    return f"Every seed succeeds with the default automatic alpha: **{word}**, {listed(parts)}{alone}."


def _counted(summary: Summary, key: str) -> tuple[list[str], bool]:
    parts, whole = [], True
    for arm in SUCCEEDING:
        rows = [task[key][arm] for task in summary["tasks"].values() if arm in task[key]]
        if rows:
            good, n = sum(row["successes"] for row in rows), sum(row["n"] for row in rows)
            parts.append(f"{of(good, n)} with `{arm}`")
            whole &= good == n
    return parts, whole
