"""What the tables of the second edition share: its tasks, finished or not, and figures of an arm in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.analysis.markdown import number, of, plus_minus
from studies.analysis.results import (
    SECOND_EDITION,
    Of,
    TaskResults,
    end,
    pooled,
    succeeded,
)
from studies.analysis.statistics import Difference, mean, paired
from studies.arms import ARMS, EDITION_2_SEEDS, EXCESSIVE, MODERATE, MODERATE_EPOCHS

Tasks = Mapping[str, TaskResults]
DEFAULT = "fusion_40"
REFIT = "refit_40"
TARGETED = "fusion_70_reset"
EMBEDDINGS = "fusion_40_embeddings"
PRICE_DESK = "price_desk"
NOT_YET = "not run yet"
PLANNED_N = len(EDITION_2_SEEDS)
TITLES = {EXCESSIVE: "excessive SFT", MODERATE: "moderate SFT"}


def all_tasks(tasks: Tasks) -> dict[str, TaskResults]:
    """Every task of the edition in order, empty where it has no runs."""
    planned = [name for name in MODERATE_EPOCHS if SECOND_EDITION.planned(name)]
    return {name: tasks.get(name) or TaskResults(name, edition=SECOND_EDITION) for name in planned}


def in_task(task: TaskResults, arm: str) -> str:
    """The arm's name in a task: moderate SFT is another rung in each."""
    return task.moderate if arm == MODERATE else arm


def title(arm: str) -> str:
    """The arm in words, with its name in the raw results."""
    known = TITLES.get(arm) or ARMS[arm].title
    return known if arm == MODERATE else f"{known} (`{arm}`)"


def knowledge(moment: str, kind: str) -> Of:
    """Share of the prices of one kind that a model knows: ``asked``, ``unasked``, ``known`` or ``new``.

    ``new`` are all that SFT teaches: asked and unasked, which are as many of each. NaN for a task without questions.

    Args:
        moment: ``start`` or ``end`` of RL.
        kind: Which prices.
    """

    def share(record: dict[str, Any]) -> float:
        known = record.get("knowledge")
        if known is None:
            return float("nan")
        kinds = ("asked", "unasked") if kind == "new" else (kind,)
        return float(sum(known[moment][each]["right"] for each in kinds) / len(kinds))

    return share


def rate(name: str, moment: str = "start") -> Of:
    """One figure of the evaluation in distribution, such as ``style_rate``, the share of careful reading."""
    return lambda record: record["id"][moment][name]


def values(task: TaskResults, arm: str, of_record: Of) -> dict[int, float]:
    """One figure of an arm by seed."""
    return task.values(in_task(task, arm), of_record)


def average(task: TaskResults, arm: str, of_record: Of, digits: int = 2) -> str:
    """The mean over the seeds that there are."""
    found = list(values(task, arm, of_record).values())
    return number(mean(found).value if found else None, digits)


def with_interval(task: TaskResults, arm: str, of_record: Of) -> str:
    """The mean over the seeds that there are, with half the width of its interval."""
    found = list(values(task, arm, of_record).values())
    return plus_minus(mean(found)._asdict() if found else None)


def count(task: TaskResults, arm: str) -> int:
    """How many seeds have the arm."""
    return len(task.records(in_task(task, arm)))


def successes(task: TaskResults, arm: str) -> str:
    """Successful seeds of those that have the arm."""
    records = task.records(in_task(task, arm)).values()
    return of(sum(map(succeeded, records)), len(records)) if records else NOT_YET


def difference(
    tasks: Sequence[TaskResults], ours: str, theirs: str, of_record: Of | None = None, test: bool = False
) -> Difference | None:
    """`ours` minus `theirs` over the seeds of some tasks that have both; by default pass@1 in distribution.

    Args:
        tasks: One task, or several whose seeds are pooled, each weighing the same.
        ours: An arm, or moderate SFT.
        theirs: What it is compared with.
        of_record: The figure.
        test: Compute the permutation test's p-value.
    """

    def of_all(arm: str) -> dict[tuple[str, int], float]:
        return {
            key: value
            for task in tasks
            for key, value in pooled([task], in_task(task, arm), of_record or end("id")).items()
        }

    return paired(of_all(ours), of_all(theirs), test=test)


def grouped(columns: int, groups: Mapping[str, Sequence[Sequence[str]]]) -> list[Sequence[str]]:
    """Rows of a table under the names of their groups, groups without rows left out."""
    rows: list[Sequence[str]] = []
    for name, members in groups.items():
        if members:
            rows += [[f"**{name}**", *[""] * (columns - 1)], *members]
    return rows
