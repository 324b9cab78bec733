"""What a rejuvenation leaves behind: a line, scalars, a report and, at the end of a fit, a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rejuv._compat import fast_dev_run, logged_step
from lightning_rejuv.loggers import log_scalars, log_text
from lightning_rejuv.report.report import RejuvenationReport


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
        except Exception as error:  # of a file system anywhere; the weights are edited, and the fit goes on
            rank_zero_warn(
                f"The report of the rejuvenation could not be written to {path!r}: {type(error).__name__}: {error}. "
                "It is in the callback's attribute `report`."
            )


def check_report_path(trainer: Trainer) -> None:
    """Warn, at the start of the fit, where the report will not be written; a collective. Makes no directory."""
    directory = _directory(trainer)
    if "://" in directory or fast_dev_run(trainer) or not trainer.is_global_zero:
        return
    path = Path(directory).absolute()
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        rank_zero_warn(
            f"The report of the rejuvenation cannot be written to {directory!r}: {str(there)!r} is no directory that "
            "can be written to. It will be in the callback's attribute `report`; for a file give the Trainer another "
            "`default_root_dir`."
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
    except (OSError, RuntimeError) as error:  # torch.save raises either where the disk is full
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
    """Where checkpoints go, or else logs."""
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
