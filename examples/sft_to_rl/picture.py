"""One page for a slide: reward during RL, start and end of every seed, entropy and drift during SFT."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.sft_to_rl.arms import ARMS
from examples.sft_to_rl.summary import headline
from examples.sft_to_rl.tasks import TASKS

INK, FAINT = "#222222", "#d9d9d9"
SMOOTHING = 5  # RL steps in the moving average of the thick curves
NAMES = {
    "base": "Base",
    "modsft": "Moderate\nSFT",
    "oversft": "Excessive\nSFT",
    "rejuvenated": "Excessive SFT,\nrejuvenated",
}


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write the picture, 1600 × 900 pixels: 2 × 2 panels for one task, a row of four per task for more."""
    figure = Figure(figsize=(16, 9), dpi=100, facecolor="white")
    tasks = summary["tasks"]
    alone = len(tasks) == 1
    rows = [_large_panels(figure)] if alone else _small_panels(figure, len(tasks))
    for (name, task), axes in zip(tasks.items(), rows, strict=True):
        of_task = "Reward during RL (pass@1 of the sampled responses)"
        _draw_rewards(axes[0], task, of_task if alone else f"{TASKS[name].title}: reward", named=alone)
        _draw_end_points(axes[1], task, explained=axes is rows[-1])
        _draw_sft(
            axes[2], task, "token_entropy", "Token entropy during SFT (nats)" if alone else "Token entropy"
        )
        _draw_sft(axes[3], task, "relative_drift", "Drift from the base during SFT" if alone else "Drift")
    main = tasks[summary["task"]]
    title = headline(main) if alone else f"{TASKS[summary['task']].title}: {headline(main)}"
    figure.text(0.02, 0.945, title, fontsize=21 if alone else 18, fontweight="bold", color=INK)
    subtitle = (
        f"{', '.join(TASKS[name].title for name in tasks)}; a small Llama; seeds "
        f"{', '.join(map(str, main['seed_numbers']))}. Every arm gets the same GRPO on the same prompts: "
        f"{main['rl_budget']:,} sampled responses."
    )
    figure.text(0.02, 0.905, subtitle, fontsize=13, color="#555555")
    figure.text(
        0.02,
        0.02,
        "Thin lines and dots are single seeds, thick lines and bars means. Token entropy is teacher-forced on "
        "demonstrations held out of SFT; drift is ‖θ - θ_base‖ / ‖θ_base‖.",
        fontsize=11,
        color="#777777",
    )
    if summary["miniature"]:
        figure.text(
            0.5, 0.5, "MINIATURE: nothing was learned", fontsize=50, color="#bbbbbb", ha="center", rotation=20
        )
    figure.savefig(path)


def _large_panels(figure: Figure) -> list[Axes]:
    room = {"left": 0.06, "right": 0.975, "top": 0.84, "bottom": 0.105, "hspace": 0.42, "wspace": 0.27}
    grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1), **room)
    return [figure.add_subplot(grid[i, j]) for i in range(2) for j in range(2)]


def _small_panels(figure: Figure, tasks: int) -> list[list[Axes]]:
    room = {"left": 0.035, "right": 0.985, "top": 0.84, "bottom": 0.125, "hspace": 0.36, "wspace": 0.22}
    # The second column is empty: room for the names of the arms.
    grid = figure.add_gridspec(tasks, 5, width_ratios=(1.3, 0.22, 1.3, 1, 1), **room)
    return [[figure.add_subplot(grid[i, j]) for j in (0, 2, 3, 4)] for i in range(tasks)]


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Trailing mean over up to `SMOOTHING` steps."""
    return np.array([values[max(0, i - SMOOTHING + 1) : i + 1].mean() for i in range(len(values))])


def _draw_rewards(axes: Axes, task: dict[str, Any], title: str, named: bool) -> None:
    _tidy(axes, title)
    labels = []
    for arm, about in ARMS.items():
        curves = np.array([result["curves"]["reward"] for result in task["arms"][arm]["per_seed"]])
        steps = np.arange(1, curves.shape[1] + 1)
        for curve in curves:
            axes.plot(steps, _smooth(curve), color=about.color, linewidth=0.9, alpha=0.55)
        mean = _smooth(curves.mean(axis=0))
        axes.plot(steps, mean, color=about.color, linewidth=3.2, solid_capstyle="round")
        labels.append([mean[-1], arm])
    _spread(labels, 0.115)
    for height, arm in labels if named else []:
        axes.text(
            steps[-1] + 0.6,
            height,
            NAMES[arm],
            color=ARMS[arm].color,
            fontsize=11,
            fontweight="bold",
            va="center",
            linespacing=0.95,
        )
    axes.set_xlim(1, steps[-1] * (1.2 if named else 1.0))
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel(f"GRPO step (mean over {SMOOTHING} steps)", fontsize=11)


def _spread(labels: list[list[Any]], gap: float) -> None:
    """Move labels up until none is closer than `gap` to the one below."""
    labels.sort(key=lambda label: label[0])
    for below, above in pairwise(labels):
        above[0] = max(above[0], below[0] + gap)


def _draw_end_points(axes: Axes, task: dict[str, Any], explained: bool) -> None:
    _tidy(axes, "Pass@1 before and after RL")
    markers = {"id": "o", "ood": "s"}
    for row, (arm, about) in enumerate(ARMS.items()):
        for split, offset in (("id", 0.17), ("ood", -0.17)):
            height = len(ARMS) - 1 - row + offset
            means = task["arms"][arm][split]
            axes.plot([means["start"], means["end"]], [height] * 2, color=about.color, linewidth=2.2)
            axes.plot(means["end"], height, "|", color=about.color, markersize=15, markeredgewidth=2.2)
            for result in task["arms"][arm]["per_seed"]:
                start, end = (result[split][moment]["pass_at_1"] for moment in ("start", "end"))
                style = {
                    "marker": markers[split],
                    "markersize": 8,
                    "linestyle": "",
                    "clip_on": False,
                    "zorder": 4,
                }
                axes.plot(
                    start, height, color="white", markeredgecolor=about.color, markeredgewidth=1.6, **style
                )
                axes.plot(end, height, color=about.color, alpha=0.85, markeredgecolor="white", **style)
    axes.set_yticks(range(len(ARMS)), [NAMES[arm] for arm in reversed(ARMS)])
    for label, arm in zip(axes.get_yticklabels(), reversed(ARMS), strict=True):
        label.set(color=ARMS[arm].color, fontweight="bold", fontsize=11)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.6, len(ARMS) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    if explained:
        style = {"color": INK, "linestyle": ""}
        handles = [
            Line2D([], [], marker="o", label="in distribution", **style),
            Line2D([], [], marker="s", label="out of distribution", **style),
            Line2D([], [], marker="o", label="before RL (filled: after)", markerfacecolor="white", **style),
        ]
        axes.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.42, -0.07),
            ncols=3,
            fontsize=10,
            frameon=False,
            handletextpad=0.2,
            columnspacing=1.0,
        )


def _draw_sft(axes: Axes, task: dict[str, Any], key: str, title: str) -> None:
    """One measure over the epochs of SFT, with the three checkpoints and the rejuvenated one marked."""
    _tidy(axes, title)
    for history in task["sft"]:
        epochs, values = (np.array(history[key][part]) for part in ("epoch", "value"))
        axes.plot(epochs, values, color="#888888", linewidth=1.2, zorder=2)
        moderate = int(np.abs(epochs - history["moderate_epochs"]).argmin())
        for index, arm in ((0, "base"), (moderate, "modsft"), (-1, "oversft")):
            axes.plot(
                epochs[index],
                values[index],
                "o",
                color=ARMS[arm].color,
                markersize=9,
                zorder=4,
                clip_on=False,
            )
    for history, result in zip(task["sft"], task["arms"]["rejuvenated"]["per_seed"], strict=True):
        before, after = history[key]["value"][-1], result["rejuvenation"][key]
        color = ARMS["rejuvenated"].color
        axes.plot([epochs[-1]] * 2, [before, after], ":", color=color, linewidth=1.6, zorder=3)
        axes.plot(epochs[-1], after, "D", color=color, markersize=9, zorder=4, clip_on=False)
    axes.annotate(
        "rejuvenated",
        (epochs[-1], after),
        xytext=(-10, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=11,
        fontweight="bold",
        color=color,
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("SFT epoch", fontsize=11)
