"""The picture of the second edition: where RL ends from seven starts, and the price desk's frontier."""

from __future__ import annotations

from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from examples.sft_to_rl.picture import FAINT, INK
from studies.analysis.results import TaskResults, end
from studies.analysis.second_brief import ROWS
from studies.analysis.second_values import (
    PRICE_DESK,
    Tasks,
    all_tasks,
    count,
    knowledge,
    values,
)
from studies.analysis.statistics import SUCCESS
from studies.arms import EXCESSIVE

TASK_STYLES = (("#0072b2", "o"), ("#e69f00", "s"), ("#cc79a7", "D"))  # Okabe-Ito
WIDTH = 26  # of a label, in characters
LANE = 0.25  # between two tasks of a row


class Marked(NamedTuple):
    """Starts of one kind on the frontier: name, marker, colour, each arm's label, and where this stands, in points."""

    name: str
    marker: str
    color: str
    arms: dict[str, str]
    offset: tuple[int, int] = (7, 4)
    filled: bool = True


FUSIONS = {"base": "0", **{f"fusion_{p}": f".{p // 10}" for p in range(20, 90, 10)}, EXCESSIVE: "1"}
MARKED = (
    Marked("rung of SFT (epochs)", "s", "#0072b2", {f"sft_{n}": str(n) for n in (4, 8, 16, 32)}, (-7, 3)),
    Marked(
        "reset of targeted neurons (alpha)",
        "^",
        "#d55e00",
        {
            f"fusion_{p}_reset": _alpha
            for p, _alpha in ((40, ".4"), (60, ".6"), (70, ".7"), (80, ".8"), (100, "1"))
        },
    ),
    Marked(
        "reset of random neurons (alpha)",
        "v",
        "#d55e00",
        {f"fusion_{p}_random": _alpha for p, _alpha in ((60, ".6"), (70, ".7"), (80, ".8"), (100, "1"))},
        (7, -12),
        filled=False,
    ),
    Marked("input embeddings kept (alpha)", "X", "#56b4e9", {"fusion_40_embeddings": ".4"}),
    Marked("refit (steps)", "D", "#009e73", {f"refit_{n}": str(n) for n in (10, 20, 40)}),
    Marked("base + refit (steps)", "D", "#009e73", {"base_refit_40": "40"}, filled=False),
    Marked(
        "fusion + refit (alpha, steps)",
        "P",
        "#aa4499",
        {
            f"fusion_{p}_refit_{n}": f".{p // 10}, {n}"
            for p, n in ((40, 10), (40, 20), (40, 40), (60, 20), (70, 20))
        },
    ),
    Marked("other SFT", "*", "#7a5230", {"sft_kl": "KL", "sft_replay": "replay"}),
)


def draw_second(tasks: Tasks) -> Figure:
    """Left every seed's pass@1 after RL, right what the price desk's starts know and where RL from them ends."""
    found = all_tasks(tasks)
    figure = Figure(figsize=(13.5, 7.4), dpi=100, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _draw_ends(left, found)
    _draw_frontier(right, found[PRICE_DESK])
    return figure


def _draw_ends(axes: Axes, tasks: Tasks) -> None:
    _tidy(axes, "Pass@1 after RL, in distribution: a dot is a seed")
    for row, arm in enumerate(reversed(ROWS)):
        for lane, ((color, marker), task) in enumerate(zip(TASK_STYLES, tasks.values(), strict=True)):
            ends = np.array(list(values(task, arm, end("id")).values()))
            height = row + LANE * (1 - lane)
            if not ends.size:
                axes.text(0.0, height, "not run yet", fontsize=10, color=color, va="center")
                continue
            heights = height + 0.06 * np.cos(2.4 * np.arange(len(ends)))
            axes.plot(
                ends,
                heights,
                marker,
                color=color,
                alpha=0.6,
                markersize=5.5,
                markeredgewidth=0,
                clip_on=False,
            )
            axes.plot(ends.mean(), height, "|", color=INK, markersize=13, markeredgewidth=2, zorder=4)
        if row:
            axes.axhline(row - 0.5, color=FAINT, linewidth=0.8)
    axes.axvline(SUCCESS, color=INK, linewidth=0.9, linestyle=":")
    axes.set_yticks(range(len(ROWS)), [fill(name, WIDTH) for name in reversed(ROWS.values())], fontsize=12)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.5, len(ROWS) - 0.5)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    handles = [
        Line2D([], [], marker=marker, linestyle="", color=color, label=task.title)
        for (color, marker), task in zip(TASK_STYLES, tasks.values(), strict=True)
    ]
    handles += [
        Line2D([], [], marker="|", linestyle="", markersize=13, markeredgewidth=2, color=INK, label="mean"),
        Line2D([], [], linestyle=":", color=INK, label="success from here"),
    ]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.4, -0.07), ncols=3, fontsize=11, frameon=False
    )


def _place(desk: TaskResults, arm: str) -> tuple[float, float] | None:
    """Means over the seeds: prices known before RL, of those that RL never asks for, and pass@1 after RL.

    None for an arm that less than half of the seeds have, which the picture leaves out.
    """
    if 2 * count(desk, arm) < len(desk.seeds):
        return None
    known = list(values(desk, arm, knowledge("start", "unasked")).values())
    ends = list(values(desk, arm, end("id")).values())
    return (float(np.mean(known)), float(np.mean(ends))) if known else None


def _draw_frontier(axes: Axes, desk: TaskResults) -> None:
    _tidy(axes, "Price desk: what is known before RL, and where RL ends")
    line = {label: place for arm, label in FUSIONS.items() if (place := _place(desk, arm))}
    handles = []
    if line:
        axes.plot(*zip(*line.values(), strict=True), "-o", color=INK, linewidth=1.4, markersize=5)
        handles.append(
            Line2D([], [], marker="o", color=INK, label="fusion (alpha): 0 is the base, 1 excessive SFT")
        )
        before = 0.0
        for label, place in line.items():
            _label(axes, label, place, INK, (-6, 4) if place[1] >= before else (-6, -12))
            before = place[1]
    for kind in MARKED:
        style: dict[str, Any] = {"marker": kind.marker, "linestyle": "", "color": kind.color, "markersize": 9}
        style["markerfacecolor"] = kind.color if kind.filled else "white"
        places = {label: place for arm, label in kind.arms.items() if (place := _place(desk, arm))}
        for label, place in places.items():
            axes.plot(*place, **style, markeredgewidth=1.5)
            _label(axes, label, place, kind.color, kind.offset)
        if places:
            handles.append(Line2D([], [], label=kind.name, markeredgewidth=1.5, **style))
    if not handles:
        axes.text(0.5, 0.5, "not run yet", fontsize=14, ha="center", transform=axes.transAxes)
    axes.axhline(SUCCESS, color=INK, linewidth=0.9, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.06, 1.02)
    axes.set_xlabel(f"prices known before RL, of those that RL never asks for{_seeds(desk)}", fontsize=12)
    axes.set_ylabel("pass@1 after RL, in distribution", fontsize=12)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.45, -0.12), ncols=2, fontsize=11, frameon=False
    )


def _seeds(desk: TaskResults) -> str:
    """Over how many seeds the means are: not the same for all starts while runs are missing."""
    shown = [*FUSIONS, *(arm for kind in MARKED for arm in kind.arms)]
    counts = sorted({count(desk, arm) for arm in shown if _place(desk, arm)})
    if not counts:
        return ""
    return f"; n = {counts[0]}" if len(counts) == 1 else f"; n = {counts[0]} to {counts[-1]}"


def _label(axes: Axes, text: str, place: tuple[float, float], color: str, offset: tuple[int, int]) -> None:
    axes.annotate(
        text,
        place,
        offset,
        textcoords="offset points",
        fontsize=11,
        color=color,
        zorder=6,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        ha="center" if not offset[0] else "left" if offset[0] > 0 else "right",
    )


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    axes.set_axisbelow(True)
