"""What all stages share: a quiet Trainer on one core, progress lines, curves, start and end evaluation."""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from examples.sft_to_rl.evaluate import Scores, evaluate
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import Task


@dataclass
class Run:
    """One seed of one task: where its results go and how it reports.

    Args:
        task: The task.
        seed: The seed of everything random.
        settings: Sizes of the stages.
        out: Directory of the demo's results.
        cache: Directory of trained bases.
        bars: Whether to draw progress bars (needs a terminal).
        position: Line of the terminal that this run's bar may use.
        tensorboard: Whether the stages write TensorBoard events.
        device: Where the models are trained, an accelerator of Lightning's: ``cpu`` or ``cuda``.
    """

    task: Task
    seed: int
    settings: Settings
    out: Path
    cache: Path
    bars: bool = False
    position: int = 0
    tensorboard: bool = True
    device: str = "cpu"

    @property
    def label(self) -> str:
        """How this run is called in progress lines."""
        return f"{self.task.name} seed {self.seed}"

    def directory(self, kind: str) -> Path:
        """This run's directory for one kind of results."""
        return self.out / kind / self.task.name / f"seed_{self.seed}"

    def say(self, message: str) -> None:
        """Print one progress line above the bars."""
        clear = "\r\033[K" if self.bars else ""
        tqdm.write(f"{clear}[{self.label}] {message}", file=sys.stderr)


def silence() -> None:
    """Keep the terminal for the demo's own lines: they say what Lightning's and transformers' would."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*IterableDataset.*__len__.*")  # one process reads it
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # data is made in memory
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.*", category=FutureWarning
    )  # Lightning on torch 2.13


class StageProgressBar(TQDMProgressBar):
    """One bar for a whole stage (not one per epoch), on the terminal line of its worker."""

    def __init__(self, description: str, position: int) -> None:
        super().__init__(refresh_rate=5, process_position=position)
        self.description = description

    def init_train_tqdm(self) -> Tqdm:
        """The bar, on standard error, where it leaves no trace."""
        steps = self.trainer.num_training_batches * (self.trainer.max_epochs or 1)
        return Tqdm(
            desc=self.description,
            total=int(steps),
            position=self.process_position,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, *_: Any) -> None:
        """Keep the stage's bar instead of starting one per epoch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one step; redraw every `refresh_rate` steps."""
        step = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
        if step % self.refresh_rate == 0 or step == self.train_progress_bar.total:
            metrics = self.get_metrics(trainer, pl_module)
            metrics.pop("v_num", None)
            self.train_progress_bar.set_postfix(metrics, refresh=False)
            self.train_progress_bar.n = step
            self.train_progress_bar.refresh()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Nothing: the postfix is up to date."""


class Curves(Logger):
    """Keeps in memory what goes to TensorBoard, for the picture and the summary."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[int]] = {}
        self.values: dict[str, list[float]] = {}

    @property
    def name(self) -> None:
        """None: nothing is written."""

    @property
    def version(self) -> None:
        """None: nothing is written."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not kept."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one point to every curve."""
        for key, value in metrics.items():
            if key != "epoch":
                self.steps.setdefault(key, []).append(int(step or 0))
                self.values.setdefault(key, []).append(float(value))


class StartAndEndEvaluation(L.Callback):
    """Evaluates the policy before its first and after its last update, in and out of distribution.

    Put it after `RejuvenationCallback`, which edits at the same hook: the start is then the edited model.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.start: dict[str, Scores] = {}
        self.end: dict[str, Scores] = {}

    def _evaluate(self, module: L.LightningModule) -> dict[str, Scores]:
        settings = self.run.settings
        sizes = {"id": settings.id_evaluation, "ood": settings.ood_evaluation}
        return {
            split: evaluate(module.model, self.run.task, split, *size, seed=self.run.seed)
            for split, size in sizes.items()
        }

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate before the first update."""
        if not self.start:
            self.start = self._evaluate(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate after the last update."""
        self.end = self._evaluate(pl_module)


def make_trainer(
    run: Run, stage: str, epochs: int, log_every: int, callbacks: Sequence[L.Callback] = ()
) -> tuple[L.Trainer, Curves]:
    """A Trainer for one stage, and the curves that it will fill.

    The stage's TensorBoard run is ``tensorboard/<task>/seed_<n>/<stage>``: arms overlay under their names.
    What an earlier demo with the same output directory left there is replaced.
    """
    curves = Curves()
    loggers: list[Logger] = [curves]
    if run.tensorboard:
        directory = run.directory("tensorboard")
        shutil.rmtree(directory / stage, ignore_errors=True)
        root, name = directory.parent.parent, f"{run.task.name}/{directory.name}"
        loggers.insert(0, TensorBoardLogger(root, name, version=stage))
    bar = [StageProgressBar(f"{run.label} · {stage}", run.position)] if run.bars else []
    trainer = L.Trainer(
        accelerator=run.device,
        devices=1,
        max_epochs=epochs,
        logger=loggers,
        callbacks=[*callbacks, *bar],
        log_every_n_steps=log_every,
        enable_progress_bar=run.bars,
        enable_checkpointing=False,  # the SFT ladder saves Hugging Face directories itself
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    return trainer, curves
