"""The raw results of the study: one file a task, finished or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from examples.sft_to_rl.tasks import TASKS
from studies.analysis.statistics import SUCCESS
from studies.arms import ARMS, MODERATE_EPOCHS
from studies.files import read_seeds
from studies.passes import passes

Record = dict[str, Any]
Of = Callable[[Record], float]


class Edition(NamedTuple):
    """Runs that were planned together and lie together.

    Args:
        directory: Where they lie, below docs/results.
        groups: The passes that belong to it; none stands for those that `studies.run` runs by default.
    """

    directory: str
    groups: tuple[str, ...] = ()

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that are planned in some task, in the order of the table of arms."""
        planned = {arm for task in MODERATE_EPOCHS for arm in self.planned(task)}
        return tuple(arm for arm in ARMS if arm in planned)

    def planned(self, task: str) -> dict[str, set[int]]:
        """The seeds that are planned for each arm of a task."""
        seeds: dict[str, set[int]] = {}
        for of_pass in passes(task, self.groups):
            for arm in of_pass.arms:
                seeds.setdefault(arm, set()).update(of_pass.seeds)
        return seeds


FIRST = Edition("study")
SECOND_EDITION = Edition("second", ("core", "frontier", "remedies"))
PLANNED = FIRST.arms


def end(split: str) -> Of:
    """Pass@1 after RL."""
    return lambda record: record[split]["end"]["pass_at_1"]


def start(split: str) -> Of:
    """Pass@1 before RL."""
    return lambda record: record[split]["start"]["pass_at_1"]


def gain(split: str) -> Of:
    """What RL added to pass@1."""
    return lambda record: end(split)(record) - start(split)(record)


def auc(record: Record) -> float:
    """Area under the curve of the training reward, divided by its length: the mean over RL steps."""
    return sum(record["reward"]) / len(record["reward"])


def succeeded(record: Record) -> bool:
    """Whether RL ends at a pass@1 of at least one half, in distribution."""
    return end("id")(record) >= SUCCESS


@dataclass
class TaskResults:
    """What is there of one task.

    Args:
        name: The task's name.
        seeds: Arms by reported seed, in the seeds' order.
        tuning: Tuning seeds that lie among the results; nothing of them is kept.
        settings: Sizes of every stage, the same for all seeds.
        versions: Every combination of versions that some seed ran with.
        tokens: Mean length of the base's own responses by seed, those that support is measured on.
        solved: Share of these responses that solve the task, by seed.
        edition: What was planned.
    """

    name: str
    seeds: dict[int, dict[str, Record]] = field(default_factory=dict)
    tuning: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: list[dict[str, str]] = field(default_factory=list)
    tokens: dict[int, float] = field(default_factory=dict)
    solved: dict[int, float] = field(default_factory=dict)
    edition: Edition = FIRST

    @property
    def title(self) -> str:
        """The task in words."""
        return TASKS[self.name].title

    @property
    def moderate(self) -> str:
        """Arm of the SFT checkpoint that was stopped in time."""
        return f"sft_{MODERATE_EPOCHS[self.name]}"

    @property
    def arms(self) -> list[str]:
        """Arms that at least one seed has, in the order of the table of arms."""
        return [arm for arm in self.edition.arms if any(arm in seed for seed in self.seeds.values())]

    def records(self, arm: str) -> dict[int, Record]:
        """The arm's record by seed, of the seeds that have it."""
        return {number: arms[arm] for number, arms in self.seeds.items() if arm in arms}

    def values(self, arm: str, of: Of) -> dict[int, float]:
        """One figure of an arm by seed; without records where it is not defined (NaN)."""
        found = {seed: float(of(record)) for seed, record in self.records(arm).items()}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}


def unfinished(task: TaskResults) -> dict[str, tuple[int, int]]:
    """Arms that lack a seed that is planned for them: how many planned seeds have them, and how many are planned.

    What a seed has beyond its plan does not count.
    """
    of_task = task.edition.planned(task.name)
    planned = {arm: of_task[arm] for arm in task.edition.arms if arm in of_task}
    run = {arm: len(seeds & task.records(arm).keys()) for arm, seeds in planned.items()}
    return {arm: (run[arm], len(seeds)) for arm, seeds in planned.items() if run[arm] < len(seeds)}


def load(directory: Path, edition: Edition = FIRST) -> dict[str, TaskResults]:
    """Read ``<task>.jsonl`` in `directory`, the results of one edition.

    Raises:
        ValueError: An unknown task or arm, or two seeds of a task that ran with different settings.
    """
    tasks: dict[str, TaskResults] = {}
    found = [content for path in directory.glob("*.jsonl") for content in read_seeds(path).values()]
    for content in sorted(found, key=lambda content: (_place(content["task"]), content["seed"])):
        task = tasks.setdefault(content["task"], TaskResults(content["task"], edition=edition))
        if content["kind"] == "tuning":
            task.tuning.append(content["seed"])
            continue
        _add(task, content)
    return {name: task for name, task in tasks.items() if task.seeds}


def _place(task: str) -> int:
    if task not in TASKS:
        raise ValueError(f"Expected a task among {sorted(TASKS)} but got {task!r}.")
    return list(TASKS).index(task)


def _add(task: TaskResults, content: Record) -> None:
    where = f"seed {content['seed']} of {task.name}"
    unknown = sorted(content["arms"].keys() - set(task.edition.arms))
    if unknown:
        raise ValueError(
            f"Expected arms of studies/arms.py, none for tuning, but {where} has {', '.join(unknown)}."
        )
    settings = _of_any_seed(content)
    task.settings = task.settings or settings
    if settings != task.settings:
        raise ValueError(
            f"Expected all seeds of {task.name} to have the same settings but {where} has "
            f"{settings} where an earlier one has {task.settings}."
        )
    if content["version"] not in task.versions:
        task.versions.append(content["version"])
    if content["arms"]:
        task.seeds[content["seed"]] = content["arms"]
        samples = content["base_samples"]
        task.tokens[content["seed"]] = samples["tokens_per_response"]
        task.solved[content["seed"]] = samples["solved"] / samples["responses"]


def _of_any_seed(content: Record) -> dict[str, Any]:
    """The settings without the seed that a task is drawn from."""
    settings = dict(content["settings"])
    if "task" in settings:
        settings["task"] = settings["task"].replace(f"(seed={content['seed']})", "(seed=…)")
    return settings


def pooled(tasks: Sequence[TaskResults], arm: str, of: Of) -> dict[tuple[str, int], float]:
    """One figure of an arm over the seeds of several tasks; a seed of each task is a run of its own."""
    return {(task.name, seed): value for task in tasks for seed, value in task.values(arm, of).items()}
