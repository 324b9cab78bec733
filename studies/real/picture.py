"""The picture of the page: every run of RL is a dot, so that two outcomes do not hide behind one mean."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.sft_to_rl.picture import FAINT, INK
from studies.real.analysis import SUCCESS, Run, by_arm
from studies.real.arms import ARMS, STARTS
from studies.real.recipes import RECIPES

# Okabe-Ito, told apart by colour-blind readers; as in the figures of the study on small models.
LADDER, EXCESSIVE, EDITED = "#56b4e9", "#d55e00", "#009e73"


def color_of(arm: str) -> str:
    """The colour of an arm: edited, excessive, or another rung of the ladder."""
    start = STARTS[ARMS[arm].start]
    if start.edit is not None:
        return EDITED
    return EXCESSIVE if start.checkpoint == "excessive" else LADDER


def draw(runs: Sequence[Run]) -> Figure:
    """A panel for each recipe below the other, a row for each arm: pass@1 in distribution before and after RL."""
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    found = by_arm(runs)
    shown = {recipe: [arm for arm in ARMS if (recipe, arm) in found] for recipe in recipes}
    rows = [len(arms) for arms in shown.values()]
    height = 0.5 + sum(0.7 + 0.36 * count for count in rows)
    figure = Figure(figsize=(9, height), dpi=100, facecolor="white", layout="constrained")
    panels = figure.subplots(len(recipes), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    panels[-1].set_xlabel("pass@1, 4-term sums")
    for panel, recipe in zip(panels, recipes, strict=True):
        _draw_panel(panel, recipe, {arm: found[recipe, arm] for arm in reversed(shown[recipe])})
    marks = [
        Line2D([], [], marker="o", linestyle="", markerfacecolor="none", color=INK, label="before RL, mean"),
        Line2D([], [], marker="o", linestyle="", color=INK, label="after RL, every run"),
        Line2D([], [], marker="|", markersize=14, linestyle="", color=INK, label="after RL, mean"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_panel(axes: Axes, recipe: str, arms: dict[str, list[Run]]) -> None:
    for row, (arm, runs) in enumerate(arms.items()):
        color = color_of(arm)
        before = fmean(run.start["id"]["pass_at_1"] for run in runs)
        ends = [run.pass_at_1 for run in runs]
        axes.plot([before, fmean(ends)], [row, row], color=FAINT, linewidth=1.5, zorder=1)
        axes.plot(before, row, marker="o", markerfacecolor="white", color=color, zorder=2)
        axes.scatter(ends, [row] * len(ends), s=22, color=color, alpha=0.6, zorder=3)
        axes.plot(fmean(ends), row, marker="|", markersize=14, markeredgewidth=2, color=color, zorder=4)
    title = RECIPES[recipe].title if recipe in RECIPES else ""
    axes.set_title(f"Recipe {recipe}: {title}", loc="left", color=INK)
    axes.set_yticks(range(len(arms)), [f"{ARMS[arm].title} ({len(runs)})" for arm, runs in arms.items()])
    axes.axvline(SUCCESS, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
