"""The rows that sum up the second edition, and a snippet that recomputes their successes."""

from __future__ import annotations

from studies.analysis.markdown import NONE, seed_ranges, table
from studies.analysis.results import TaskResults, end
from studies.analysis.second_values import (
    DEFAULT,
    EMBEDDINGS,
    NOT_YET,
    PLANNED_N,
    PRICE_DESK,
    TARGETED,
    Tasks,
    all_tasks,
    average,
    count,
    knowledge,
    successes,
)
from studies.arms import EDITION_2_SEEDS, EXCESSIVE, MODERATE

ROWS = {
    EXCESSIVE: "excessive SFT",
    MODERATE: "moderate SFT",
    "long_rl": "4 x the RL steps",
    "refit_40": "refit, 40 steps",
    DEFAULT: "fusion, alpha 0.4, the default",
    TARGETED: "fusion, alpha 0.7, + reset, 4 %",
    EMBEDDINGS: "fusion, alpha 0.4, input embeddings kept",
}

#: Recomputes the successes of `brief` for one task; run it in the root of the repository.
RECOMPUTE = """\
import json

arms = ["sft_64", "sft_8", "long_rl", "refit_40", "fusion_40", "fusion_70_reset", "fusion_40_embeddings"]
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


def brief(tasks: Tasks) -> str:
    """Where RL ends from seven starts on three tasks, and what the price desk's model then knows."""
    found = all_tasks(tasks)
    header = ["RL from"]
    for task in found.values():
        header += [f"{task.title}: ID (OOD)", f"{task.title}: successes"]
    header.append("Price desk: prices known after RL")
    rows = []
    for row, name in ROWS.items():
        cells = [name if row == MODERATE else f"{name} (`{row}`)"]
        for task in found.values():
            cells += _cells(task, row)
        desk = found[PRICE_DESK]
        cells.append(average(desk, row, knowledge("end", "unasked")))
        rows.append(cells)
    return f"{table(header, rows)}\n\n{_about(found)}"


def _cells(task: TaskResults, row: str) -> list[str]:
    if not count(task, row):
        return [NOT_YET, NONE]
    return [f"{average(task, row, end('id'))} ({average(task, row, end('ood'))})", successes(task, row)]


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
        "All but moderate SFT start from excessive SFT. Prices known are those of the half that RL never asks for."
    )
