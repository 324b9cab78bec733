"""What a page may hold of the second edition, whose results may be unfinished or empty."""

from __future__ import annotations

from studies.analysis.markdown import NONE, listed, of, seed_ranges, table
from studies.analysis.results import SECOND_EDITION, TaskResults
from studies.analysis.second_brief import brief, recompute
from studies.analysis.second_confirmatory import confirmatory
from studies.analysis.second_defaults import defaults
from studies.analysis.second_pairs import pair_blocks
from studies.analysis.second_sentences import sentence_blocks
from studies.analysis.second_tables import row_blocks
from studies.analysis.second_values import NOT_YET, Tasks, all_tasks, count
from studies.passes import Pass, passes


def second_blocks(tasks: Tasks) -> dict[str, str]:
    """Tables and sentences of the second edition.

    Args:
        tasks: Its results, `load(directory, SECOND_EDITION)`; a task without runs may be missing.
    """
    return {
        "second brief": brief(tasks),
        "second confirmatory": confirmatory(tasks),
        "second defaults": defaults(tasks),
        "second state": state(tasks),
        "second recompute": recompute(),
        **sentence_blocks(tasks),
        **row_blocks(tasks),
        **pair_blocks(tasks),
    }


def state(tasks: Tasks) -> str:
    """What has been run of each pass, what is missing, and what it ran on."""
    found = all_tasks(tasks)
    header = ["task", "pass", "arms", "seeds with all of them", "runs", "not on all seeds yet"]
    rows = [
        [task.title, *_of_pass(task, of_pass)]
        for task in found.values()
        for of_pass in passes(task.name, SECOND_EDITION.groups)
        if of_pass.arms
    ]
    return f"{table(header, rows)}\n\n{_machines(found)}"


def _of_pass(task: TaskResults, of_pass: Pass) -> list[str]:
    whole = [seed for seed in of_pass.seeds if set(of_pass.arms) <= task.seeds.get(seed, {}).keys()]
    runs = {arm: len(task.records(arm).keys() & set(of_pass.seeds)) for arm in of_pass.arms}
    few = [f"`{arm}` {n}" for arm, n in runs.items() if n < len(of_pass.seeds)]
    if not any(runs.values()):
        missing = NOT_YET
    elif len(few) == len(runs):
        missing = "all of them"
    else:
        missing = ", ".join(few) or "none"
    return [
        of_pass.name,
        str(len(of_pass.arms)),
        f"{seed_ranges(whole)} ({len(whole)})" if whole else NONE,
        of(sum(runs.values()), len(of_pass.seeds) * len(runs)),
        missing,
    ]


def _machines(tasks: Tasks) -> str:
    """Versions and processors that the records name."""
    every = [version for task in tasks.values() for version in task.versions]
    if not every:
        return "No run has been recorded yet."
    processors = sorted({version.get("cpu", "a processor that was not noted") for version in every})
    packages = sorted(
        {
            ", ".join(f"{name} {value}" for name, value in version.items() if name != "cpu")
            for version in every
        }
    )
    runs = sum(count(task, arm) for task in tasks.values() for arm in task.arms)
    return f"The {runs} runs were made with {listed(packages)}, on {listed(processors)}."
