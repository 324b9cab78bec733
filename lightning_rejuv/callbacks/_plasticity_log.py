"""What the plasticity callback writes where: scalars, maps, layout and events."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_rejuv.loggers import log_figure, log_histogram, log_scalars, log_text, takes_figures
from lightning_rejuv.metrics.monitor import PlasticityMonitor
from lightning_rejuv.plots import before_after, heat_map

PREFIX = "plasticity/"


def log_values(trainer: Trainer, values: Mapping[str, Tensor], step: int) -> list[str]:
    """Write measures under ``plasticity/`` to all loggers and into ``trainer.callback_metrics``; return the names."""
    named = {PREFIX + name: value for name, value in values.items()}
    trainer.callback_metrics.update(named)
    log_scalars(trainer.loggers, named, step)
    return list(named)


def log_event(trainer: Trainer, name: str, text: str, step: int) -> None:
    """Write what happened."""
    log_text(trainer.loggers, PREFIX + name, text, step)


def log_maps(trainer: Trainer, layers: Mapping[str, Mapping[str, float]], step: int) -> None:
    """Draw one layer × module map for every measure that has more than one place."""
    if not trainer.is_global_zero or not takes_figures(trainer.loggers):
        return
    for measure, values in layers.items():
        if len(values) > 1:
            figure = heat_map(values, measure, f"step {step}")
            log_figure(trainer.loggers, f"plasticity_map/{measure}", figure, step)


def log_layers(trainer: Trainer, monitor: PlasticityMonitor, step: int) -> list[str]:
    """Write every layer's scalars, whose names are returned, and histograms of the neurons' scores. A collective."""
    layers = monitor.layer_values()
    scores = monitor.dormancy_scores()
    scalars = {
        f"plasticity_layers.{measure}/{place}": value
        for measure, values in layers.items()
        for place, value in values.items()
    }
    log_scalars(trainer.loggers, scalars, step)
    for site, values in scores.items():
        log_histogram(trainer.loggers, f"plasticity_scores/{site}", values, step)
    return list(scalars)


def log_rejuvenation(
    trainer: Trainer,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    base: Mapping[str, float],
    step: int,
) -> None:
    """Draw the measures before and after, beside the base's."""
    shared = {k for k in before if k in after}
    if not shared or not trainer.is_global_zero or not takes_figures(trainer.loggers):
        return
    old, new = ({k: float(v) for k, v in values.items()} for values in (before, after))
    figure = before_after(old, new, base, f"Rejuvenated at step {step}")
    log_figure(trainer.loggers, "plasticity_map/rejuvenation", figure, step)


def custom_layout(names: Collection[str]) -> dict[str, Any]:
    """Return TensorBoard's custom scalars; a chart of measures also shows the step of the rejuvenation.

    Args:
        names: the scalars that have data: charts without any would show that step alone, and are left out.

    >>> custom_layout(["plasticity/relative_drift", "plasticity/rejuvenated"])["plasticity"].keys()
    dict_keys(['drift'])
    """
    event = PREFIX + "rejuvenated$"
    charts = {
        "plasticity": {
            "entropy": ["token_entropy$", "entropy_gap$"],
            "support": ["support_retention$"],
            "drift": ["relative_drift$", "drift_sparsity$"],
            "rank": ["effective_rank$", "stable_rank$"],
            "rollouts": ["pass_at_.*$", "zero_variance_fraction$"],
            "gradient and update": ["gradient_norm$", "update_norm$", "update_ratio$"],
        },
        "plasticity by layer": {
            "drift": [r"plasticity_layers\.relative_drift/.*"],
            "dormancy score": [r"plasticity_layers\.dormancy_score_low/.*"],
        },
    }
    layout: dict[str, Any] = {}
    for category, of_category in charts.items():
        measures = category == "plasticity"
        for title, patterns in of_category.items():
            tags = [PREFIX + pattern for pattern in patterns] if measures else patterns
            if any(re.match(tag, name) for tag in tags for name in names):
                chart = ["Multiline", [*tags, event] if measures else tags]
                layout.setdefault(category, {})[title] = chart
    return layout
