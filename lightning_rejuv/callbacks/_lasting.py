"""Whether the edit lasts: something that holds the old weights may write them back in the next steps."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rejuv.weights.targets import Targets

_STEPS = 10
_SAMPLE = 512
_PARAMETERS = 16


class LastingEdit:
    """Watches some elements of the edited parameters over the optimizer steps after an edit.

    A step that takes back more than half of the edit, and is more than twice as long as the next one, is none that a
    gradient makes: an optimizer, or a callback, holds the weights in a place that is not known here, and that is
    said. Where the next one is as long, the edit was no larger than a step. Sharded parameters are not watched.

    Args:
        targets: the parameters, before the edit.
    """

    def __init__(self, targets: Targets) -> None:
        parameters = [] if targets.layout.sharded else list(targets.parameters.values())
        self._parameters = parameters[:: max(1, len(parameters) // _PARAMETERS)]
        self._now = self._sample()
        self._edit = torch.empty(0)
        self._steps = 0
        self._suspected: tuple[int, float, float] | None = None  # step, share that it took back, its length

    def begin(self, trainer: Trainer) -> None:
        """Take note of the edit, which has been made."""
        before, self._now = self._now, self._sample()
        self._edit = before - self._now
        self._steps = trainer.global_step

    def goes_on(self, trainer: Trainer) -> bool:
        """Look after a batch; return whether to look again."""
        if trainer.global_step - self._steps > _STEPS or not self._edit.any():
            return False
        before, self._now = self._now, self._sample()
        moved = self._now - before
        if self._suspected is None:
            back = float(moved @ self._edit / self._edit.square().sum())
            if back > 0.5:
                self._suspected = trainer.global_step, back, float(moved.norm())
            return True
        step, back, length = self._suspected
        if step == trainer.global_step:
            return True  # gradients are accumulated
        if float(moved.norm()) > 0.5 * length:
            return False
        kinds = sorted({type(getattr(o, "optimizer", o)).__name__ for o in trainer.optimizers})
        rank_zero_warn(
            f"The update to step {step} took {back:.0%} of the rejuvenation back: something holds the "
            f"weights from before it, the state of the optimizer ({', '.join(kinds)}) or a callback. Rejuvenate the "
            "model before this fit (`lightning_rejuv.rejuvenate`), or do without what holds them."
        )
        return False

    @torch.no_grad()
    def _sample(self) -> Tensor:
        parts = []
        for parameter in self._parameters:
            flat = parameter.detach().flatten()
            parts.append(flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu())
        return torch.cat(parts) if parts else torch.empty(0)
