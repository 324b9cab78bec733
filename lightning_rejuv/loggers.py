"""One way to write scalars, figures, text and histograms, whatever loggers a Trainer has.

TensorBoard, CSV (files beside ``metrics.csv``), Weights & Biases and MLflow are known; any other logger gets scalars
alone, and one message says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import WarningCache  # type: ignore[attr-defined]
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Messages of this process that are not repeated, as Lightning keeps its own.
_told = WarningCache()


def log_scalars(loggers: Iterable[Logger], values: Mapping[str, Tensor | float], step: int) -> None:
    """Write scalars to every logger, under the group separator that each one uses.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        values: scalars by key; ``/`` separates a group from a name.
        step: the x-axis, :func:`lightning_rejuv._compat.logged_step`.
    """
    scalars = {key: float(value) for key, value in values.items()}
    for logger in loggers:
        with _going_on(logger):
            renamed = {key.replace("/", logger.group_separator): value for key, value in scalars.items()}
            logger.log_metrics(renamed, step=step)


@rank_zero_only
def log_figure(loggers: Sequence[Logger], key: str, figure: Figure, step: int) -> None:
    """Write a figure to every logger that takes one.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        key: its name; ``/`` separates a group from a name.
        figure: a matplotlib figure.
        step: the x-axis.
    """
    for logger in loggers:
        with _going_on(logger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(key, figure, global_step=step, close=False)
            elif isinstance(logger, WandbLogger):
                logger.log_image(key, [figure], step=step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_figure(logger.run_id, figure, f"{key}/step_{step:07d}.png")
            elif isinstance(logger, CSVLogger):
                figure.savefig(_beside(logger, f"{key}/step_{step:07d}.png"))
            else:
                _told.info(
                    f"Figures are not written to {type(logger).__name__}, which is not known to take them."
                )


@rank_zero_only
def log_text(loggers: Sequence[Logger], key: str, text: str, step: int) -> None:
    """Write a text to every logger that takes one; the text is not interpreted.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        key: its name; ``/`` separates a group from a name.
        text: what happened.
        step: the x-axis.
    """
    for logger in loggers:
        with _going_on(logger):
            if isinstance(logger, TensorBoardLogger):
                # TensorBoard shows Markdown, in which two blanks end a line.
                logger.experiment.add_text(key, "  \n".join(text.splitlines()), step)
            elif isinstance(logger, WandbLogger):
                logger.log_text(key, columns=["step", "text"], data=[[str(step), text]], step=step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_text(logger.run_id, text, f"{key}/step_{step:07d}.txt")
            elif isinstance(logger, CSVLogger):
                with _beside(logger, f"{key}.txt").open("a", encoding="utf-8") as file:
                    file.write(f"step {step}\n{text}\n\n")
            else:
                _told.info(
                    f"Texts are not written to {type(logger).__name__}, which is not known to take them."
                )


@rank_zero_only
def log_histogram(loggers: Sequence[Logger], key: str, values: Tensor, step: int) -> None:
    """Write a histogram of values to TensorBoard; other loggers have none.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        key: its name.
        values: any shape.
        step: the x-axis.
    """
    for logger in loggers:
        with _going_on(logger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(key, values.detach().float().cpu(), global_step=step)


@rank_zero_only
def log_layout(loggers: Sequence[Logger], layout: Mapping[str, Any]) -> None:
    """Give TensorBoard a custom-scalars layout; a writer keeps only the last one it is given.

    Args:
        loggers: ``trainer.loggers``; may be empty.
        layout: as :meth:`torch.utils.tensorboard.SummaryWriter.add_custom_scalars` takes it.
    """
    for logger in loggers:
        with _going_on(logger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(dict(layout))


def takes_figures(loggers: Sequence[Logger]) -> bool:
    """Tell whether a figure would be drawn and written; say once if matplotlib or any logger is missing."""
    if find_spec("matplotlib") is None:
        _told.info("Figures are not drawn: they need matplotlib (`pip install lightning-rejuv[plots]`).")
        return False
    if not loggers:
        _told.info(
            "There is no logger: measures go to `trainer.callback_metrics` alone, figures are not drawn."
        )
    return any(isinstance(x, (TensorBoardLogger, WandbLogger, MLFlowLogger, CSVLogger)) for x in loggers)


@contextmanager
def _going_on(logger: Logger) -> Iterator[None]:
    """Keep a logger's failure from the fit, which may just have edited the model; warn of it once."""
    try:
        yield
    except Exception as error:
        kind = type(logger).__name__
        _told.warn(f"{kind} failed with {type(error).__name__}: {error}. The fit goes on without it.")


def _beside(logger: CSVLogger, name: str) -> Path:
    path = Path(logger.log_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
