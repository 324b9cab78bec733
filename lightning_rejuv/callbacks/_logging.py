"""What callbacks leave behind: scalars, figures and texts of measures; a line, a report and a checkpoint of an edit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_rejuv._compat import fast_dev_run, logged_step
from lightning_rejuv.loggers import (
    log_figure,
    log_histogram,
    log_layout,
    log_scalars,
    log_text,
    takes_figures,
)
from lightning_rejuv.metrics.monitor import PlasticityMonitor
from lightning_rejuv.plots import before_after, heat_map
from lightning_rejuv.report.report import RejuvenationReport

PREFIX = "plasticity/"


def log_values(trainer: Trainer, values: Mapping[str, Tensor], step: int) -> list[str]:
    """Write measures under ``plasticity/`` to all loggers and into ``trainer.callback_metrics``; return the names."""
    named = {PREFIX + name: value for name, value in values.items()}
    trainer.callback_metrics.update(named)
    log_scalars(trainer.loggers, named, step)
    return list(named)


def log_event(trainer: Trainer, name: str, text: str, step: int) -> None:
    """Write a text about an event to the loggers."""
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
    """Write every layer's scalars and histograms of the neurons' scores; return the scalars' names. A collective."""
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


def log_before_after(
    trainer: Trainer,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    base: Mapping[str, float],
    step: int,
) -> None:
    """Draw the measures before and after a rejuvenation, beside the base's."""
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
            "sharpness": ["sharpness$"],
            "SAM gap": ["sam_gap$"],
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


class ChartLayout:
    """TensorBoard's layout of the charts that have data; it is written anew when a curve changes it."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._written: dict[str, Any] = {}

    def add(self, trainer: Trainer, names: Collection[str]) -> None:
        """Add the names of scalars that have data."""
        if self._names.issuperset(names):
            return
        self._names.update(names)
        layout = custom_layout(self._names)
        if layout != self._written:
            self._written = layout
            log_layout(trainer.loggers, layout)


def announce(
    trainer: Trainer,
    report: RejuvenationReport,
    reason: str,
    name: str | None,
    *,
    at_end: bool,
    repeats: bool,
) -> None:
    """Say in one line what was done and why; write its figures to the loggers and the report to a file.

    Args:
        trainer: the Trainer.
        report: what was done.
        reason: why, as :meth:`Trigger.reason` puts it.
        name: the callback's.
        at_end: whether no update follows in this fit.
        repeats: whether there may be more reports in this run.
    """
    moment = "after" if at_end else "before"
    line = f"Rejuvenated {moment} step {trainer.global_step}, {reason}: {report.summary()}"
    rank_zero_info(line)
    group = "rejuvenation/" if name is None else f"rejuvenation/{name}/"
    scalars = {group + key: value for key, value in _scalars(report).items()}
    log_scalars(trainer.loggers, scalars, logged_step(trainer))
    log_text(trainer.loggers, group + "summary", line, logged_step(trainer))
    step = f"-step={trainer.global_step}" if repeats else ""
    path = f"{_directory(trainer)}/{_named('rejuvenation', name)}{step}.json"  # a collective: on every rank
    if trainer.is_global_zero and not fast_dev_run(trainer):
        try:
            _write(report, path)
        except (
            Exception
        ) as error:  # a file system may raise anything; the weights are edited, so the fit goes on
            rank_zero_warn(
                f"The report of the rejuvenation could not be written to {path!r}: {type(error).__name__}: {error}. "
                "It is in the callback's attribute `report`."
            )


def check_report_path(trainer: Trainer) -> None:
    """Warn, at the start of the fit, if the report will not be written. This is a collective and makes no directory."""
    directory = _directory(trainer)
    if "://" in directory or fast_dev_run(trainer) or not trainer.is_global_zero:
        return
    path = Path(directory).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        rank_zero_warn(
            f"The report of the rejuvenation cannot be written to {directory!r}: {str(existing)!r} is no directory "
            "that can be written to. It will be in the callback's attribute `report`; for a file give the Trainer "
            "another `default_root_dir`."
        )


def save_rejuvenated(trainer: Trainer, name: str | None) -> None:
    """Write ``rejuvenated.ckpt`` beside the files of the Trainer's ModelCheckpoint, if it has one.

    Args:
        trainer: the Trainer.
        name: the callback's.
    """
    saver = _model_checkpoint(trainer)
    if saver is None or fast_dev_run(trainer):
        return
    path = f"{saver.dirpath}/{_named('rejuvenated', name)}{saver.FILE_EXTENSION}"
    try:
        trainer.save_checkpoint(path, saver.save_weights_only)
    except (OSError, RuntimeError) as error:  # torch.save raises either if the disk is full
        if trainer.world_size > 1:
            raise  # the other ranks are waiting for what follows the writing
        rank_zero_warn(
            f"The rejuvenated model could not be written to {path!r}: {type(error).__name__}: {error}. It is in the "
            "LightningModule: write it elsewhere with `trainer.save_checkpoint`. Checkpoints that were written before "
            "hold the weights before the rejuvenation."
        )
        return
    rank_zero_info(f"Its weights are in {path}; checkpoints written before it hold the weights before it.")


def _directory(trainer: Trainer) -> str:
    """Return where checkpoints go or, without any, logs."""
    logs = trainer.log_dir or trainer.default_root_dir
    saver = _model_checkpoint(trainer)
    return str(logs if saver is None else saver.dirpath)


def _write(report: RejuvenationReport, path: str) -> None:
    if "://" not in path:
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            report.save(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return
    files = get_filesystem(path)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    with files.open(path, "w") as file:
        json.dump(report.to_dict(), file, indent=1)


def _model_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    savers = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    return next((saver for saver in savers if saver.dirpath), None)


def _named(stem: str, name: str | None) -> str:
    return stem if name is None else f"{stem}-{name}"


def _scalars(report: RejuvenationReport) -> dict[str, float]:
    values: dict[str, float | None] = {
        "drift_before": report.drift_before,
        "drift_after": report.drift_after,
        "neurons_reset": float(report.neurons_reset),
    }
    if isinstance(report.alpha, float):
        values["alpha"] = report.alpha
    if report.comparison:
        values["token_entropy_before"] = report.comparison.entropy_before
        values["token_entropy_after"] = report.comparison.entropy_after
        values["token_entropy_anchor"] = report.comparison.entropy_base
    if report.refit:
        values["refit_loss_before"] = report.refit.joint_before
        values["refit_loss_after"] = report.refit.joint_after
    return {name: value for name, value in values.items() if value is not None}
