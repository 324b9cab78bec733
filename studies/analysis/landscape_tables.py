"""The tables and sentences about the landscape of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from studies.analysis.landscape import CURVATURES, DRIFT, FUSED, LOSSES, MEASURES, SIDES
from studies.analysis.markdown import (
    NONE,
    interval,
    listed,
    number,
    of,
    plus_minus,
    seed_ranges,
    signed,
    table,
)
from studies.arms import ARMS

Summary = Mapping[str, Any]
TITLES = {
    "fusion_40_reset_entropy": "fusion, alpha 0.4 + entropy gradient, 2 %",
    "refit_40": "refit, 40 steps",
}
LOSS_TITLES = {"demonstrations": "demonstrations", "base_samples": "base samples"}
PLANNED_SEEDS = frozenset(range(1021, 1029))  # studies/plan_landscape.md
DIGITS = {"sharpness": 1, "sam_gap": 3, "relative_sam_gap": 3}


def landscape_blocks(found: Summary | None) -> dict[str, str]:
    """Tables and sentences by the name of their place in a page; none without results."""
    if found is None:
        return {}
    return {
        "landscape state": state(found),
        **{f"landscape starts {name}": starts_table(task) for name, task in found["tasks"].items()},
        "landscape changes": changes_table(found),
        **{f"landscape forecast {side}": forecast_table(found, side) for side in SIDES},
        "landscape findings": findings(found),
    }


def called(measure: str) -> str:
    """A measure in a table.

    >>> called("base_samples/sam_gap"), called("alpha")
    ('`sam_gap`, base samples', '`alpha`')
    """
    loss, _, name = measure.rpartition("/")
    return f"`{name}`, {LOSS_TITLES[loss]}" if loss else f"`{name}`"


def state(found: Summary) -> str:
    """Which seeds were measured, where, and whether their bases are those that RL was run from."""
    parts = []
    for task in found["tasks"].values():
        same, seeds = task["bases_as_recorded"], task["seeds"]
        recorded = f"the base is bit for bit the recorded one in {of(same, len(seeds))}"
        planned = of(len(PLANNED_SEEDS & set(seeds)), len(PLANNED_SEEDS))
        parts.append(
            f"{task['title']}: seeds {seed_ranges(seeds)}, {planned} of those that were planned; {recorded}"
        )
    places = {
        f"{where['cpu']}, torch {where['torch']}, transformers {where['transformers']}"
        for task in found["tasks"].values()
        for where in task["where"]
    }
    return f"{'. '.join(parts)}. Measured on {listed(sorted(places))}."


def starts_table(task: Summary) -> str:
    """What was measured on every start, and what RL made of the recorded start of that name."""
    header = ["start", "n", *(called(name) for name in MEASURES), "pass@1 after RL", "successes"]
    rows = []
    for arm, row in task["arms"].items():
        title = f"{TITLES.get(arm) or ARMS[arm].title} (`{arm}`)"
        cells = [plus_minus(row["measures"][name], DIGITS[name.rpartition("/")[2]]) for name in MEASURES]
        ends = [plus_minus(row["end"]), of(row["successes"], row["runs"]) if row["runs"] else NONE]
        rows.append([title, str(row["n"]), *cells, *ends])
    return table(header, rows)


def changes_table(found: Summary) -> str:
    """How much sharper the over-trained checkpoint is: log ratios, bold where the interval excludes 0."""
    header = ["log of over-trained over"]
    for task in found["tasks"].values():
        header += [f"{task['title']}: moderate", f"{task['title']}: {ARMS[FUSED].title}"]
    return table(
        header,
        [
            [
                called(name),
                *(
                    signed(task["changes"][name][against])
                    for task in found["tasks"].values()
                    for against in ("over_moderate", "over_fused")
                ),
            ]
            for name in MEASURES
        ],
    )


def forecast_table(found: Summary, side: str) -> str:
    """Correlation within a seed, ROC-AUC as it is, and the turned area above drift's."""
    header = ["measure", "success goes with"]
    for task in found["tasks"].values():
        header += [f"{task['title']}: Spearman within seed", "ROC-AUC", f"turned, minus `{DRIFT}`'s"]
    rows = []
    for name, row in found["forecast"][side]["measures"].items():
        cells = []
        for of_task in row["tasks"].values():
            above = NONE if name == DRIFT else signed(of_task["above_drift"])
            cells += [signed(of_task["spearman"]), interval(of_task["roc_auc"]), above]
        rows.append([called(name), "smaller" if row["smaller"] else "larger", *cells])
    return table(header, rows)


def findings(found: Summary) -> str:
    """What follows by the rules of the plan, a line each."""
    lines = []
    for side, where in zip(SIDES, ("Over all starts", "On the over-trained side"), strict=True):
        forecast = found["forecast"][side]
        n = ", ".join(
            f"{row['successes']} of {row['starts']} succeed ({found['tasks'][task]['title'].lower()})"
            for task, row in forecast["counts"].items()
        )
        rows = {name: forecast["measures"][name] for name in MEASURES}
        says = [name for name, row in rows.items() if row["says"]]
        correlated = [name for name, row in rows.items() if row["correlated"]]
        text = (
            f"- {where} ({n}): {len(correlated)} of {len(rows)} measures go with the end point in both tasks"
        )
        text += f", {_with_directions(rows, correlated)}" if correlated else ""
        if says:
            text += f"; above drift in both: {_with_directions(rows, says)}"
            clear = [name for name in says if rows[name]["clearly"]]
            text += f"; clearly above it: {listed([called(name) for name in clear]) or 'none'}."
        else:
            text += "; none tells success from failure better than drift in both."
        lines.append(text)
    for loss in LOSSES:
        lines.append(f"- Over-trained against moderate, {LOSS_TITLES[loss]}: {_changes(found, loss)}.")
    return "\n".join(lines)


def _with_directions(rows: Mapping[str, Any], names: list[str]) -> str:
    return listed([f"{called(n)} ({'smaller' if rows[n]['smaller'] else 'larger'} is better)" for n in names])


def _changes(found: Summary, loss: str) -> str:
    """Geometric means of over-trained ÷ moderate, the tasks in their order."""
    texts = []
    for name in CURVATURES:
        each = []
        for task in found["tasks"].values():
            row = task["changes"][f"{loss}/{name}"]["over_moderate"]
            each.append(NONE if row is None else number(math.exp(row["value"])))
        texts.append(f"`{name}` by a factor of {' / '.join(each)}")
    return listed(texts)
