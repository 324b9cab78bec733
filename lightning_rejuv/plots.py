"""Figures of the monitor's measures, without pyplot state; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_rejuv._compat import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.(.+)$")
_OUTSIDE = "other"
_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9822b", "#8a8a8a"


class Style(NamedTuple):
    """Title, unit and colour scale of a measure; the scale does not move between steps."""

    title: str
    unit: str = ""
    low: float = 0.0
    high: float | None = None
    log: bool = False


STYLES = {
    "token_entropy": Style("token entropy", "nats"),
    "token_nll": Style("NLL of the probe's tokens", "nats"),
    "top1_confidence": Style("top-1 confidence", "probability", high=1.0),
    "entropy_gap": Style("entropy gap to the base", "nats"),
    "support_retention": Style("support retention", "nats a response"),
    "relative_drift": Style("drift from the base", "‖W - W_base‖ / ‖W_base‖", low=1e-4, high=1.0, log=True),
    "drift_sparsity": Style("unmoved weights", "fraction", high=1.0),
    "dormant_fraction": Style("dormant neurons", "fraction (0 if smooth)", high=1.0),
    "dormancy_score_low": Style("dormancy score, 5 % quantile", "layer mean = 1", high=1.0),
    "active_fraction": Style("active units", "fraction", high=1.0),
    "gradient_dormancy": Style("gradient-dormant neurons", "fraction", high=1.0),
    "effective_rank": Style("effective rank", "dimensions"),
    "stable_rank": Style("stable rank ‖Φ‖²_F / ‖Φ‖²_2", "dimensions"),
    "srank": Style("srank (δ = 0.01)", "dimensions"),
    "sharpness": Style("sharpness λ_max", "nats / ‖θ‖²"),
    "sam_gap": Style("SAM gap", "nats"),
}

#: Measures that the figure before/after leaves out: 0 or 1 on smooth activations, or one more view of another.
_SECONDARY = ("drift_sparsity", "dormant_fraction", "active_fraction", "stable_rank", "srank", "entropy_gap")


def heat_map(values: Mapping[str, float], measure: str, subtitle: str = "") -> Figure:
    """Draw a measure as layers × modules.

    Args:
        values: by the name of a parameter or site; those that belong to no layer share a row.
        measure: its key, for title, unit and colour scale.
        subtitle: second line of the title, say the step.

    Returns:
        A figure without pyplot state: it is freed with its last reference.

    Raises:
        ValueError: no value.
        ModuleNotFoundError: matplotlib is not installed (``pip install lightning-rejuv[plots]``).
    """
    if not values:
        raise ValueError(f"Expected at least one value of {measure!r} to draw but got none.")
    matplotlib = _matplotlib()
    style = STYLES.get(measure, Style(measure))
    rows, columns, cells, captions = _grid(values)
    # TensorBoard shows 300 pixels' width unless one enlarges: narrow cells and large letters.
    size = (1.9 + 0.5 * max(3, len(columns)), 1.6 + 0.34 * max(4, len(rows)))
    figure: Figure = matplotlib.figure.Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.add_subplot()
    low, high = _limits(style, values)
    norm_type = matplotlib.colors.LogNorm if style.log else matplotlib.colors.Normalize
    norm = norm_type(low, high, clip=True)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#ececec")
    table = [[cells.get((row, column), math.nan) for column in range(len(columns))] for row in rows]
    image = axes.imshow(table, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    axes.set_xticks(
        range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=10
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.set_ylabel("layer", fontsize=10)
    axes.set_title(style.title + (f"\n{subtitle}" if subtitle else ""), fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(rows) <= 40:
        for (row, column), value in cells.items():
            caption = captions.get(column, "") + "\n" if row == _OUTSIDE else ""
            dark = math.isnan(value) or norm(value) < 0.55
            style_of: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
            size_of = 7 if caption else 8
            axes.text(column, rows.index(row), caption + _short(value), fontsize=size_of, **style_of)
    bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.02)
    bar.set_label(style.unit, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def before_after(
    before: Mapping[str, float],
    after: Mapping[str, float],
    base: Mapping[str, float] | None = None,
    title: str = "Before and after rejuvenation",
) -> Figure:
    """Draw each measure before and after an edit of the weights, beside the base's own value.

    Args:
        before: measures by key.
        after: likewise; measures that only one of the two has are left out.
        base: the base's values, drawn as a dashed line.
        title: of the whole figure.

    Raises:
        ValueError: no measure in common.
        ModuleNotFoundError: matplotlib is not installed.
    """
    shared = [key for key in STYLES if key in before and key in after and key not in _SECONDARY]
    shared = [key for key in shared if math.isfinite(before[key]) and math.isfinite(after[key])]
    if not shared:
        raise ValueError(f"Expected a measure in both but got {sorted(before)} and {sorted(after)}.")
    matplotlib = _matplotlib()
    columns = min(3, len(shared))
    lines = math.ceil(len(shared) / columns)
    size = (2.2 * columns, 2.2 * lines + 0.4)
    figure: Figure = matplotlib.figure.Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for place, key in enumerate(shared):
        axes = figure.add_subplot(lines, columns, place + 1)
        style = STYLES[key]
        values = (before[key], after[key])
        bars = axes.bar(("before", "after"), values, color=[_GREY, _BLUE], width=0.6)
        axes.bar_label(bars, [_short(value) for value in values], fontsize=8, padding=2)
        reference = (base or {}).get(key)
        # Drift from itself says nothing about the base.
        if reference is not None and key != "relative_drift":
            axes.axhline(reference, color=_ORANGE, linestyle="--", linewidth=1.2)
            axes.annotate(
                "base", (1.0, reference), xycoords=("axes fraction", "data"), fontsize=7, color=_ORANGE,
                xytext=(3, 0), textcoords="offset points", va="center",
            )  # fmt: skip
        axes.margins(y=0.22)
        axes.set_title(style.title, fontsize=9, wrap=True)
        axes.set_ylabel(style.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _grid(
    values: Mapping[str, float],
) -> tuple[list[str], list[str], dict[tuple[str, int], float], dict[int, str]]:
    """Return rows (layers in order), columns in order of appearance, cells by row and column, and captions.

    Values in no layer come last, in a row of their own whose cells need captions instead of columns.
    """
    cells: dict[tuple[str, int], float] = {}
    columns: dict[str, int] = {}
    outside: dict[str, float] = {}
    for name, value in values.items():
        found = _IN_LAYER.search(name)
        if found is None:
            outside[_label(name)] = value
        else:
            cells[found[1], columns.setdefault(_label(found[2]), len(columns))] = value
    rows = sorted({row for row, _ in cells}, key=int)
    labels = [*columns, *[""] * (len(outside) - len(columns))]
    if outside:
        rows.append(_OUTSIDE)
        cells.update({(_OUTSIDE, place): value for place, value in enumerate(outside.values())})
    return rows, labels, cells, dict(enumerate(outside))


def _label(name: str) -> str:
    """Shorten a parameter's name to what tells it apart: its module, and "bias" if it is one."""
    parts = name.split(".")
    if parts[-1] == "weight" and len(parts) > 1:
        parts.pop()
    label = " ".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]
    for long, short in (
        ("_proj", ""),
        ("layernorm", "norm"),
        ("attention", "attn"),
        ("embed_tokens", "embed"),
    ):
        label = label.replace(long, short)
    return label


def _limits(style: Style, values: Mapping[str, float]) -> tuple[float, float]:
    if style.high is not None:
        return style.low, style.high
    top = max((value for value in values.values() if math.isfinite(value)), default=1.0)
    # The next power of two: the scale stays where it is while the values move a little.
    return style.low, 2.0 ** math.ceil(math.log2(max(top, 1e-6)))


def _short(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _matplotlib() -> Any:
    matplotlib = require("matplotlib", "A figure")
    for part in ("backends.backend_agg", "colors", "figure"):
        import_module(f"matplotlib.{part}")
    return matplotlib
