"""One way to write scalars, whatever loggers a Trainer has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import Logger
from torch import Tensor


def log_scalars(loggers: Iterable[Logger], values: Mapping[str, Tensor | float], step: int) -> None:
    """Write scalars to every logger, under the group separator that each one uses.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        values: scalars by key; ``/`` separates a group from a name.
        step: the x-axis, :func:`lightning_rejuv._compat.logged_step`.
    """
    scalars = {key: float(value) for key, value in values.items()}
    for logger in loggers:
        renamed = {key.replace("/", logger.group_separator): value for key, value in scalars.items()}
        logger.log_metrics(renamed, step=step)
