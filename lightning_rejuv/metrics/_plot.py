"""Plots of what a collection has measured, in the form that torchmetrics gives them; any measure may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.plot import plot_single_or_multi_val

Values = Mapping[str, Tensor]


def plot_values(
    val: Values | Sequence[Values], metrics: Mapping[str, Metric], ax: Any, together: bool
) -> Any:
    """Plot what was measured; see :meth:`MeasureCollection.plot`.

    Args:
        val: one measurement, or one for each step.
        metrics: metrics by name, for the bounds of their plots; measures of sites have no metric of their own.
        ax: axes to draw in.
        together: draw all measures in one plot.

    Raises:
        ValueError: ``ax`` does not fit the measures.
    """
    steps = [val] if isinstance(val, Mapping) else list(val)
    names = list(dict.fromkeys(name for step in steps for name in step))
    if not names:
        rank_zero_warn("Nothing was measured yet: there is nothing to plot.")
    series = {name: [_value(step.get(name)) for step in steps] for name in names}
    if together:
        rows = [{name: values[number] for name, values in series.items()} for number in range(len(steps))]
        return plot_single_or_multi_val(
            rows if len(rows) > 1 else {k: v[0] for k, v in series.items()}, ax=ax
        )
    if ax is not None and (not isinstance(ax, Sequence) or len(ax) != len(names)):
        got = len(ax) if isinstance(ax, Sequence) else type(ax).__name__
        raise ValueError(
            f"Expected argument `ax` to be a sequence of {len(names)} axes, of {names}, but got {got}."
        )
    return [
        plot_single_or_multi_val(
            values if len(values) > 1 else values[0],
            ax=None if ax is None else ax[number],
            lower_bound=getattr(metrics.get(name), "plot_lower_bound", None),
            upper_bound=getattr(metrics.get(name), "plot_upper_bound", None),
            name=name,
        )
        for number, (name, values) in enumerate(series.items())
    ]


def _value(value: Tensor | float | None) -> Tensor:
    """Return what a step gives, or NaN, a gap in the curve, if it gives nothing."""
    return torch.as_tensor(float("nan") if value is None else value, dtype=torch.float64, device="cpu")
