"""Whether gradients are half accumulated: then an edit has to wait, since they belong to the weights before it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


class Accumulation:
    """Follows how a fit accumulates gradients.

    By ``accumulate_grad_batches`` with automatic optimization, by DeepSpeed's own count where it accumulates.
    With manual optimization nobody says how: there gradients are taken to be left behind by a batch in which
    no optimizer stepped.
    """

    def __init__(self) -> None:
        self._manual = False
        self._left_behind = False
        self._steps = 0

    def begin(self, trainer: Trainer) -> None:
        """Start a fit, without gradients."""
        self._manual = not trainer.lightning_module.automatic_optimization
        self._left_behind = False
        self._steps = trainer.global_step

    def after_batch(self, trainer: Trainer) -> None:
        """Take note of a batch."""
        if not self._manual:
            return  # counting steps would cost as much as all else that the callback does in one
        self._left_behind = trainer.global_step == self._steps
        self._steps = trainer.global_step

    def unfinished(self, trainer: Trainer, next_batch: int | None = None) -> bool:
        """Whether gradients are half accumulated now.

        Args:
            trainer: the Trainer.
            next_batch: index in its epoch of the batch that comes next; by default the one after the last.
        """
        if trainer.strategy.handles_gradient_accumulation:  # DeepSpeed, also across the end of an epoch
            engine: Any = trainer.strategy.model
            return bool(engine.micro_steps % engine.gradient_accumulation_steps())
        if not trainer.lightning_module.automatic_optimization:
            return self._left_behind
        if next_batch is None:
            next_batch = 0 if trainer.is_last_batch else trainer.fit_loop.batch_idx + 1
        return bool(next_batch % trainer.accumulate_grad_batches)
