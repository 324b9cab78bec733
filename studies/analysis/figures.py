"""The figures of the pages of evidence: every seed is a dot, so that two outcomes do not hide behind one mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.sft_to_rl.picture import FAINT, INK
from studies.analysis import forecast
from studies.analysis.checks import DEFAULT, EARLIER, NAMED, REMEDIES
from studies.analysis.forecast_tables import ranked, turned_areas
from studies.analysis.reset_tables import CONTROLS, OPTIONS
from studies.analysis.results import TaskResults, end, start
from studies.analysis.statistics import SUCCESS
from studies.analysis.tables import FIXED, arm_of_alpha
from studies.arms import ARMS, EXCESSIVE

# Okabe-Ito, told apart by colour-blind readers; the four of the demo keep theirs.
COLORS = {
    "ladder": "#56b4e9",
    "fusion": "#0072b2",
    "alpha": "#009e73",
    "reset": "#cc79a7",
    "rigid": "#e69f00",
    "remedy": "#7a5230",
}
TASK_COLORS = ("#0072b2", "#e69f00", "#cc79a7")
NO_BREAK = "\N{NO-BREAK SPACE}"
WIDTH = 44  # characters of a label, then it goes on in a second line
AREAS = 14  # measures in the panel of ROC-AUCs
SMALLER = "\N{DOWNWARDS ARROW}"  # marks a measure whose area is that of its negative

Tasks = Mapping[str, TaskResults]


def draw(tasks: Tasks, summary: Mapping[str, Any], directory: Path) -> None:
    """Write ``study-*.png`` into `directory`."""
    figures = {
        "end-points": draw_arms(tasks, _claim),
        "alpha": draw_alpha(tasks),
        "reset": draw_arms(tasks, lambda _: by_end(tasks, CONTROLS)),
        "options": draw_arms(
            tasks, lambda _: by_end(tasks, (DEFAULT, "rigid_entropy", "rigid_reset", *OPTIONS))
        ),
        "forecast": draw_forecast(tasks, summary),
    }
    for name, figure in figures.items():
        figure.savefig(directory / f"study-{name}.png", metadata={"Software": None})


def color_of(arm: str) -> str:
    """The arm's colour, that of its group but for the base and the over-trained checkpoint."""
    return {"base": "#8c8c8c", EXCESSIVE: "#d55e00"}.get(arm, COLORS[ARMS[arm].group])


def _claim(task: TaskResults) -> Sequence[str]:
    fixed = ("fusion_30", "fusion_50")
    return ("base", task.moderate, *EARLIER, EXCESSIVE, *REMEDIES, *fixed, *NAMED, DEFAULT)


def by_end(tasks: Tasks, arms: Sequence[str]) -> list[str]:
    """Arms in the order of where they end in distribution, the best first: means over seeds, then over tasks."""

    def height(arm: str) -> float:
        each = [list(task.values(arm, end("id")).values()) for task in tasks.values()]
        return float(np.mean([np.mean(values) for values in each if values] or [0.0]))

    return sorted(arms, key=height, reverse=True)


def draw_arms(tasks: Tasks, arms_of: Callable[[TaskResults], Sequence[str]]) -> Figure:
    """A panel for each task, a row for each arm: seeds in and out of distribution, and their means."""
    shown = {name: [arm for arm in arms_of(task) if task.records(arm)] for name, task in tasks.items()}
    rows = max(len(arms) for arms in shown.values())
    figure = Figure(figsize=(14, 1.9 + 0.56 * rows), dpi=100, facecolor="white", layout="constrained")
    for axes, (name, task) in zip(_panels(figure, len(tasks)), tasks.items(), strict=True):
        _tidy(axes, f"{task.title}: pass@1 after RL")
        for row, arm in enumerate(reversed(shown[name])):
            _draw_row(axes, task, arm, row)
        labels = [_label(arm, len(task.records(arm))) for arm in reversed(shown[name])]
        axes.set_yticks(range(len(labels)), labels, fontsize=9.5, color=INK)
        axes.axvline(SUCCESS, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
    _explain(figure)
    return figure


def _label(arm: str, seeds: int) -> str:
    """What an arm is, in lines that keep a percent sign with its number; below it its name and its count of seeds."""
    title = fill(ARMS[arm].title.replace(" %", f"{NO_BREAK}%"), WIDTH)
    return f"{title}\n{arm} ({seeds})"


def _draw_row(axes: Axes, task: TaskResults, arm: str, row: int) -> None:
    color = color_of(arm)
    for split, marker, offset in (("id", "o", 0.17), ("ood", "s", -0.17)):
        values = np.array(list(task.values(arm, end(split)).values()))
        heights = row + offset + 0.05 * np.cos(2.4 * np.arange(len(values)))
        axes.plot(
            values, heights, marker, color=color, alpha=0.55, markersize=4.5, markeredgewidth=0, clip_on=False
        )
        axes.plot(values.mean(), row + offset, "|", color=INK, markersize=11, markeredgewidth=1.8, zorder=4)
    before = np.mean(list(task.values(arm, start("id")).values()))
    axes.plot(
        before, row + 0.17, "o", color="white", markeredgecolor=color, markersize=5.5, clip_on=False, zorder=3
    )


def _explain(figure: Figure) -> None:
    style = {"color": INK, "linestyle": ""}
    handles = [
        Line2D([], [], marker="o", label="a seed, in distribution", **style),
        Line2D([], [], marker="s", label="a seed, out of distribution", **style),
        Line2D([], [], marker="|", markersize=11, label="mean", **style),
        Line2D([], [], marker="o", markerfacecolor="white", label="mean before RL (ID)", **style),
        Line2D([], [], linestyle=":", color=INK, label="success from here"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=10, frameon=False)


def draw_alpha(tasks: Tasks) -> Figure:
    """End points over a fixed alpha, and where the automatic rule lands."""
    figure = Figure(figsize=(13, 5.2), dpi=100, facecolor="white", layout="constrained")
    for axes, task in zip(_panels(figure, len(tasks)), tasks.values(), strict=True):
        _tidy(axes, f"{task.title}: pass@1 after RL over alpha")
        names = {alpha: arm_of_alpha(alpha, task.name) for alpha in (0.0, *FIXED.values(), 1.0)}
        alphas = [alpha for alpha, arm in names.items() if task.records(arm)]
        for split, style in (("id", "-"), ("ood", "--")):
            each = [list(task.values(names[alpha], end(split)).values()) for alpha in alphas]
            axes.plot(alphas, [np.mean(values) for values in each], style, color=INK, linewidth=1.4)
            for alpha, values in zip(alphas, each, strict=True) if split == "id" else ():
                places = alpha + 0.014 * np.cos(2.4 * np.arange(len(values)))
                color = color_of(names[alpha])
                axes.plot(places, values, "o", color=color, alpha=0.6, markersize=5, markeredgewidth=0)
        picks = [record["alpha"] for record in task.records("auto_nll_100").values()]
        axes.plot(picks, [1.04] * len(picks), "|", color=COLORS["alpha"], markersize=12, clip_on=False)
        axes.axhline(SUCCESS, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(-0.03, 1.08)
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks(np.linspace(0, 1, 11))
        axes.set_xlabel("alpha: 0 is the base, 1 the over-trained checkpoint", fontsize=11)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=COLORS["fusion"], label="a seed, in distribution"),
        Line2D([], [], color=INK, label="mean, in distribution"),
        Line2D([], [], color=INK, linestyle="--", label="mean, out of distribution"),
        Line2D(
            [],
            [],
            marker="|",
            markersize=11,
            linestyle="",
            color=COLORS["alpha"],
            label="alpha that the rule finds",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
    return figure


def draw_forecast(tasks: Tasks, summary: Mapping[str, Any]) -> Figure:
    """Support against the end point, a dot for each start, and every measure's ROC-AUC on held-out seeds."""
    figure = Figure(figsize=(15, 5.4), dpi=100, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(tasks) + 1, width_ratios=[1] * len(tasks) + [1.1], squeeze=False)[0]
    for axes, task in zip(panels, tasks.values(), strict=False):
        _tidy(axes, f"{task.title}: support before RL")
        for found in forecast.having(forecast.starts([task]), "support"):
            axes.plot(
                found.measures["support"],
                found.end,
                "o",
                color=color_of(found.arm),
                alpha=0.45,
                markersize=4,
                markeredgewidth=0,
            )
        axes.axhline(SUCCESS, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("nats a response, of the base's own responses", fontsize=11)
        axes.set_ylabel("pass@1 after RL (ID)", fontsize=11)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(color=FAINT, linewidth=0.6)
    used = {ARMS[arm].group for task in tasks.values() for arm in task.arms} - {"remedy"}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, label=group)
        for group, color in COLORS.items()
        if group in used
    ]
    handles += [
        Line2D([], [], marker="o", linestyle="", color=color_of(arm), label=arm)
        for arm in ("base", EXCESSIVE)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=8, fontsize=10, frameon=False)
    _draw_areas(panels[-1], tasks, summary)
    return figure


def _draw_areas(axes: Axes, tasks: Tasks, summary: Mapping[str, Any]) -> None:
    _tidy(axes, "ROC-AUC for success, held-out seeds")
    measures = ranked(summary, "over_trained")[:AREAS][::-1]
    labels = []
    for row, measure in enumerate(measures):
        found, reverse = turned_areas(summary, "over_trained", measure)
        labels.append(f"{measure} {SMALLER}" if reverse else measure)
        for place, (name, color) in enumerate(zip(tasks, TASK_COLORS, strict=False)):
            area = found.get(name)
            if area is None:
                continue
            height = row + 0.16 * (0.5 - place)
            if area["low"] is not None:
                axes.plot([area["low"], area["high"]], [height] * 2, color=color, linewidth=1.6)
            axes.plot(area["value"], height, "o", color=color, markersize=6, clip_on=False)
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(measures)), labels, fontsize=9.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(f"{SMALLER} smaller values go with success; without it larger ones", fontsize=11)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    handles = [
        Line2D([], [], marker="o", color=color, label=task.title)
        for task, color in zip(tasks.values(), TASK_COLORS, strict=False)
    ]
    axes.figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=10, frameon=False)


def _panels(figure: Figure, count: int) -> Sequence[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    axes.set_axisbelow(True)
