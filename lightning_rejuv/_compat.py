"""Every private or version-dependent name of another package; each has a canary in tests/test_compat.py."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torchmetrics import Metric


def logged_step(trainer: Trainer) -> int:
    """Return the x-axis of Lightning's own logging: batches after which an optimizer has stepped.

    ``trainer.global_step`` counts every optimizer's steps and runs ahead where there are several. Inside
    ``on_train_batch_end`` the batch at hand is not counted yet.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def first_logged_step(trainer: Trainer) -> int:
    """Return the x-axis in ``on_train_start``, where a resumed Trainer's own count is still one behind.

    A checkpoint that is written in ``on_train_batch_end`` does not count the batch at hand; the Trainer makes
    up for it only after ``on_train_start``. With one optimizer its steps are the same count, and right.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return logged_step(trainer)


def log_interval(trainer: Trainer) -> int:
    """Return every how many steps the Trainer logs; 0 for never. Set by a connector, so not declared."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined, no-any-return]


def language_model(module: nn.Module) -> nn.Module:
    """Return the only Hugging Face model inside a module, or the module itself where there is not one.

    Models inside another, as the decoder inside a causal language model, do not count. transformers is not
    imported: where nobody has, there is no such model.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return module
    found: list[nn.Module] = []
    for child in module.modules():
        if isinstance(child, transformers.PreTrainedModel) and not any(_inside(child, m) for m in found):
            found.append(child)
    return found[0] if len(found) == 1 else module


def _inside(module: nn.Module, outer: nn.Module) -> bool:
    return any(child is module for child in outer.modules())


def mark_updated(metric: Metric) -> None:
    """Do for a metric what its wrapped ``update`` does: drop the cached value, count an update."""
    metric._computed = None
    metric._update_count += 1


def reshard(model: nn.Module) -> None:
    """Give back the full parameters that a forward without backward leaves behind under FSDP2.

    While the root group is unsharded its parameters are copies, and every edit of them is discarded.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
