"""What the plan of the second edition decides beforehand: its first question's checks and eight comparisons."""

from __future__ import annotations

from typing import NamedTuple

from studies.analysis.markdown import DASH, MINUS, NONE, number, of, p_value, signed, table
from studies.analysis.results import Of, TaskResults, succeeded
from studies.analysis.second_values import (
    DEFAULT,
    NOT_YET,
    PLANNED_N,
    PRICE_DESK,
    Tasks,
    all_tasks,
    difference,
    knowledge,
    successes,
    values,
)
from studies.analysis.statistics import Difference, holm, mcnemar_p, mean
from studies.arms import EXCESSIVE

LEVEL = 0.05
UNFINISHED = "unfinished"


class Planned(NamedTuple):
    """One comparison of the plan: `ours` minus `theirs` on a task, pass@1 after RL in distribution."""

    question: str
    ours: str
    theirs: str
    task: str


PLANNED = (
    *(
        Planned("2: default against excessive SFT", DEFAULT, EXCESSIVE, task)
        for task in ("retail_desk", "running_total", PRICE_DESK)
    ),
    *(
        Planned("3: default against a refit on equal data", DEFAULT, "refit_40", task)
        for task in ("retail_desk", "running_total", PRICE_DESK)
    ),
    Planned("4: a targeted reset against a random one", "fusion_70_reset", "fusion_70_random", PRICE_DESK),
    Planned("4: a targeted reset against none", "fusion_70_reset", "fusion_70", PRICE_DESK),
)


class Result(NamedTuple):
    """What became of a planned comparison.

    Args:
        planned: The comparison.
        difference: Over the seeds that have both; None if there are none.
        mcnemar: Exact p-value for the successes.
        adjusted: Holm's p-value; None while the comparison is unfinished.
    """

    planned: Planned
    difference: Difference | None
    mcnemar: float | None
    adjusted: float | None

    @property
    def verdict(self) -> str:
        """What follows, in words; nothing does while seeds are missing."""
        if self.difference is None:
            return NOT_YET
        if self.adjusted is None:
            return f"{UNFINISHED}, {of(self.difference.estimate.n, PLANNED_N)} seeds"
        if self.adjusted >= LEVEL:
            return "not told apart"
        return "above" if self.difference.estimate.value > 0 else "below"


def confirmatory_results(tasks: Tasks) -> list[Result]:
    """The eight comparisons.

    Holm's adjustment is over all eight: those that are unfinished count as p = 1, which makes the adjusted p-values
    of the others too large rather than too small.
    """
    found = all_tasks(tasks)
    compared = [
        difference([found[planned.task]], planned.ours, planned.theirs, test=True) for planned in PLANNED
    ]
    whole = [
        difference is not None and difference.p is not None and difference.estimate.n >= PLANNED_N
        for difference in compared
    ]
    p_values = {
        str(place): (made.p if made is not None and made.p is not None and done else 1.0)
        for place, (made, done) in enumerate(zip(compared, whole, strict=True))
    }
    adjusted = holm(p_values)
    return [
        Result(
            planned,
            made,
            _mcnemar(found[planned.task], planned),
            adjusted[str(place)] if done else None,
        )
        for place, (planned, made, done) in enumerate(zip(PLANNED, compared, whole, strict=True))
    ]


def _mcnemar(task: TaskResults, planned: Planned) -> float | None:
    sides = (
        {seed: succeeded(record) for seed, record in task.records(arm).items()}
        for arm in (planned.ours, planned.theirs)
    )
    return mcnemar_p(*sides)


class Check(NamedTuple):
    """Something that the price desk has to show to be of use.

    Args:
        claim: What is expected.
        arm: Of which arm.
        of_record: The figure of a run.
        threshold: What the mean, or the count, over seeds is to reach or to stay within.
        at_least: Whether the threshold is a lower one.
        counted: Whether it is a count of seeds, which further seeds can only raise.
    """

    claim: str
    arm: str
    of_record: Of
    threshold: float
    at_least: bool = False
    counted: bool = False

    def found(self, task: TaskResults) -> float | None:
        """The figure over the seeds that there are: their mean, or how many."""
        by_seed = list(values(task, self.arm, self.of_record).values())
        if not by_seed:
            return None
        return sum(by_seed) if self.counted else mean(by_seed).value

    def verdict(self, task: TaskResults) -> str:
        """Whether it is met; open while seeds are missing, unless no seed could change it."""
        value, n = self.found(task), len(values(task, self.arm, self.of_record))
        if value is None:
            return NOT_YET
        holds = value >= self.threshold if self.at_least else value <= self.threshold
        if self.counted and not holds:
            return "not met" if n >= PLANNED_N else f"not met already, {of(n, PLANNED_N)} seeds"
        if n < PLANNED_N:
            return f"{UNFINISHED}, {of(n, PLANNED_N)} seeds"
        return "met" if holds else "not met"


CHECKS = (
    Check("excessive SFT knows at least .8 of the prices", EXCESSIVE, knowledge("start", "new"), 0.8, True),
    Check("RL from excessive SFT succeeds in at most 4 of 20 seeds", EXCESSIVE, succeeded, 4, counted=True),
    Check(
        "the base with 40 steps on the calibration data knows at most .5 of the prices",
        "base_refit_40",
        knowledge("start", "new"),
        0.5,
    ),
    Check("RL from the base succeeds in at most 1 of 20 seeds", "base", succeeded, 1, counted=True),
)


def confirmatory(tasks: Tasks) -> str:
    """Question 1 first, as planned, then the family of eight."""
    desk = all_tasks(tasks)[PRICE_DESK]
    results = confirmatory_results(tasks)
    verdicts = [check.verdict(desk) for check in CHECKS]
    rows = [
        [check.claim, f"`{check.arm}`", _figure(check, desk), of_threshold(check), verdict]
        for check, verdict in zip(CHECKS, verdicts, strict=True)
    ]
    checks = table(["question 1, the price desk", "arm", "found", "threshold", "verdict"], rows)
    return f"{_purpose(verdicts)}\n\n{checks}\n\n{_about(results)}\n\n{_comparisons(tasks, results)}"


def of_threshold(check: Check) -> str:
    """The threshold with its side."""
    side = "≥" if check.at_least else "≤"
    return f"{side} {check.threshold:g}"


def _figure(check: Check, desk: TaskResults) -> str:
    value, n = check.found(desk), len(values(desk, check.arm, check.of_record))
    if value is None:
        return NONE
    return of(round(value), n) if check.counted else f"{number(value)} (n = {n})"


def _purpose(verdicts: list[str]) -> str:
    if any(verdict.startswith("not met") for verdict in verdicts):
        return "**The price desk fails its purpose: not all checks that were set beforehand are met.**"
    if all(verdict == "met" for verdict in verdicts):
        return "The price desk does what it is for: all checks that were set beforehand are met."
    return "Whether the price desk does what it is for is not decided yet: runs are missing."


def _about(results: list[Result]) -> str:
    done = sum(result.adjusted is not None for result in results)
    return (
        f"Of the eight comparisons {done} are finished. Differences are of pass@1 after RL in "
        "distribution, paired by seed; Holm's adjustment is over all "
        "eight, where an unfinished one counts as p = 1; McNemar's test is of the successes."
    )


def _comparisons(tasks: Tasks, results: list[Result]) -> str:
    found = all_tasks(tasks)
    header = [
        "comparison",
        "task",
        "n",
        "difference",
        f"wins{DASH}losses",
        "successes",
        "p",
        "p, Holm",
        "p, McNemar",
        "verdict",
    ]
    rows = []
    for result in results:
        question, ours, theirs, name = result.planned
        made, task = result.difference, found[name]
        sides = f"{successes(task, ours)} against {successes(task, theirs)}"
        cells = ["0", *[NONE] * 6]
        if made is not None:
            shown = signed(made.estimate._asdict())
            cells = [
                str(made.estimate.n),
                shown if result.adjusted is not None else shown.replace("**", ""),
                f"{made.wins}{DASH}{made.losses}",
                sides,
                p_value(made.p),
                p_value(result.adjusted),
                p_value(result.mcnemar),
            ]
        rows.append([f"{question}: `{ours}` {MINUS} `{theirs}`", task.title, *cells, result.verdict])
    return table(header, rows)
