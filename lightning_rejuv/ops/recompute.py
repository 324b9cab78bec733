"""Whether a forward hook runs a second time: activation checkpointing repeats it inside the backward pass."""

from __future__ import annotations

import torch


def is_recomputing() -> bool:
    """Whether the caller runs inside a backward pass, where a forward hook can only be a repetition.

    Skip accumulation while it is True, or every layer under activation checkpointing counts its tokens twice.
    It holds for both kinds of ``torch.utils.checkpoint``. Inside ``torch.compile`` it is False: a compiled
    graph counts once.

    Example:
        >>> from lightning_rejuv import ops
        >>> ops.is_recomputing()
        False
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
