"""One plan for all processes: rank zero makes it and hands it round, so that every rank makes the same edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rejuv.config import Options
from lightning_rejuv.data import Data
from lightning_rejuv.make_plan import Findings, make_plan
from lightning_rejuv.plan import Plan
from lightning_rejuv.refit import check_refit
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.replica import Replica, make_replica
from lightning_rejuv.weights.targets import Targets

T = TypeVar("T")


def make_plan_on_rank_zero(
    model: nn.Module, targets: Targets, data: Data, options: Options
) -> tuple[Plan, Findings, Replica | None]:
    """Plan as :func:`lightning_rejuv.make_plan.make_plan` does, once for all processes; each has to call it.

    If parameters are sharded and the model has to be run, it is run on a whole copy of it, so that the plan
    is that of a single process.

    Args:
        model: the SFT model.
        targets: what fusion edits, matched with the anchor.
        data: what the caller brings; rank zero's counts.
        options: what is wanted.

    Returns:
        The plan; what was seen on the process that made it, empty on the others; and, on rank zero, the whole copy of
        the model that it was made with, if one was.

    Raises:
        ValueError: on rank zero, as :func:`lightning_rejuv.rejuvenate`.
        RuntimeError: on the other ranks, with rank zero's message.
    """
    check_refit(targets, options)
    if targets.layout.sharded and not options.runs_the_model:
        # All that it reads is the same everywhere.
        return *make_plan(model, targets, data, options), None
    replica = make_replica(model, targets) if targets.layout.sharded else None
    made: Plan | None = None
    findings = Findings()
    failure: Exception | None = None
    if dist.get_rank() == 0:
        seen = (replica.model, replica.targets) if replica else (model, targets)
        try:
            made, findings = make_plan(*seen, data, options)
        except Exception as error:  # the other ranks wait for it
            failure = error
    message = None if failure is None else f"Planning failed on rank 0: {failure}"
    # What a refit moved is as large as the model, and goes round by itself.
    small = made and replace(made, moves=dict.fromkeys(made.moves, torch.empty(0)))
    small, message = broadcast((small, message))
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(message)
    plan = made or small
    assert plan is not None
    return replace(plan, moves=_broadcast_moves(plan.moves, targets.layout)), findings, replica


def _broadcast_moves(moves: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return on every rank what a refit on rank zero moved, one parameter after the other."""
    found = {}
    for name, move in moves.items():
        parameter = layout.parameters[name]
        if dist.get_rank():
            kind = torch.promote_types(parameter.dtype, torch.float32)
            move = torch.empty(parameter.shape, dtype=kind, device=parameter.device)
        found[name] = move.contiguous()
        dist.broadcast(found[name], src=0)
    return found


def broadcast(value: T) -> T:
    """Return rank zero's value on every rank; it may hold no tensor on a device."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
