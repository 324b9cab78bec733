"""The six rows that sum up the second edition, and a snippet that recomputes their successes."""

from __future__ import annotations

from studies.analysis.markdown import NONE, seed_ranges, table
from studies.analysis.results import TaskResults, end
from studies.analysis.second_values import (
    DEFAULT,
    NOT_YET,
    PLANNED_N,
    PRICE_DESK,
    Tasks,
    all_tasks,
    average,
    count,
    in_task,
    knowledge,
    successes,
    values,
)
from studies.analysis.statistics import mean
from studies.arms import ARMS, EDITION_2_SEEDS, EXCESSIVE, MODERATE

BEST = "best"  # stands for `best_other`
ROWS = {
    EXCESSIVE: "excessive SFT",
    MODERATE: "moderate SFT",
    BEST: "best other rung, or remedy within RL",
    "long_rl": "4 x the RL steps",
    "refit_40": "refit, 40 steps",
    DEFAULT: "fusion, alpha 0.4, the default",
}

#: Recomputes the successes of `brief` for one task; run it in the root of the repository.
RECOMPUTE = """\
import json

arms = ["sft_64", "sft_8", "sft_4", "sft_16", "sft_32", "long_rl", "refit_40", "fusion_40"]
ends = {arm: [] for arm in arms}
with open("docs/results/second/price_desk.jsonl") as lines:
    for line in lines:
        run = json.loads(line)
        if run.get("arm") in ends:
            ends[run["arm"]].append(run["id"]["end"]["pass_at_1"])
for arm, found in ends.items():
    print(f"{arm}: {sum(value >= 0.5 for value in found)}/{len(found)}")
"""


def recompute() -> str:
    """The snippet as a block of code."""
    return f"```python\n{RECOMPUTE}```"


def best_other(task: TaskResults) -> str | None:
    """The rung but moderate and excessive SFT that ends highest; without one, the remedy within RL that does.

    Candidates are those that most seeds have. None if there is none yet.
    """
    rungs = [
        arm
        for arm, about in ARMS.items()
        if about.group == "ladder" and arm not in ("base", EXCESSIVE, task.moderate)
    ]
    remedies = [
        arm
        for arm, about in ARMS.items()
        if about.remedy and about.alpha is None and about.start == EXCESSIVE and arm != "long_rl"
    ]
    for candidates in (rungs, remedies):
        most = max(count(task, arm) for arm in candidates)
        if most:
            whole = [arm for arm in candidates if count(task, arm) == most]
            return max(whole, key=lambda arm: mean(list(values(task, arm, end("id")).values())).value)
    return None


def brief(tasks: Tasks) -> str:
    """Where RL ends from six starts on three tasks, and what the price desk's model then knows."""
    found = all_tasks(tasks)
    header = ["RL from"]
    for task in found.values():
        header += [f"{task.title}: ID (OOD)", f"{task.title}: successes"]
    header.append("Price desk: prices known after RL")
    rows = []
    for row, name in ROWS.items():
        cells = [name if row in (MODERATE, BEST) else f"{name} (`{row}`)"]
        for task in found.values():
            cells += _cells(task, row)
        desk = found[PRICE_DESK]
        arm = best_other(desk) if row == BEST else row
        cells.append(average(desk, arm, knowledge("end", "unasked")) if arm else NONE)
        rows.append(cells)
    return f"{table(header, rows)}\n\n{_about(found)}"


def _cells(task: TaskResults, row: str) -> list[str]:
    arm = best_other(task) if row == BEST else row
    if arm is None or not count(task, arm):
        return [NOT_YET, NONE]
    which = f" `{in_task(task, arm)}`" if row == BEST else ""
    ends = f"{average(task, arm, end('id'))} ({average(task, arm, end('ood'))}){which}"
    return [ends, successes(task, arm)]


def _about(tasks: Tasks) -> str:
    parts = [
        f"{task.title}: seeds {seed_ranges(list(task.seeds))} (n = {len(task.seeds)})"
        if task.seeds
        else f"{task.title}: {NOT_YET}"
        for task in tasks.values()
    ]
    return (
        f"Planned are seeds {seed_ranges(EDITION_2_SEEDS)} ({PLANNED_N}) of each task. Of these there are so far: "
        f"{'; '.join(parts)}. A cell has the mean pass@1 after RL in distribution and, in brackets, out of "
        "distribution; successes are the seeds that end at .5 or above in distribution, of those that have the arm. "
        "The third row is a remedy within RL where no other rung was run; it is picked on the seeds that it is shown "
        "for, which flatters it. The last three start from excessive SFT. Prices known are those of "
        "the half that RL never asks for."
    )
