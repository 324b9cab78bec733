"""One plan for all processes: rank zero makes it and hands it round, so that every rank makes the same edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rejuv.config import Options
from lightning_rejuv.plan import Data, Plan, make_plan
from lightning_rejuv.refit import check_refit
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.replica import Replica, make_replica
from lightning_rejuv.weights.targets import Targets

T = TypeVar("T")


def make_plan_on_rank_zero(
    model: nn.Module, targets: Targets, data: Data, options: Options
) -> tuple[Plan, Replica]:
    """Plan as :func:`lightning_rejuv.plan.make_plan` does, once for all processes; each has to call it.

    Where parameters are sharded and the model has to be run, it is run on a whole copy of it, so that the plan
    is that of a single process.

    Args:
        model: the SFT model.
        targets: what fusion edits, matched with the anchor.
        data: what the caller brings; rank zero's counts.
        options: what is wanted.

    Returns:
        The plan, and what it was made with: on rank zero the copy of the model, if one was made; else the model.

    Raises:
        ValueError: on rank zero, as :func:`lightning_rejuv.rejuvenate`.
        RuntimeError: on the other ranks, with rank zero's message.
    """
    check_refit(targets, options)
    if targets.layout.sharded and not options.runs_the_model:
        # All that it reads is the same everywhere.
        return make_plan(model, targets, data, options), Replica(model, targets)
    replica = make_replica(model, targets) if targets.layout.sharded else None
    planned = replica or Replica(model, targets)
    made: Plan | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            made = make_plan(planned.model, planned.targets, data, options)
        except Exception as error:  # the other ranks wait for it
            failure = error
    message = None if failure is None else f"Planning failed on rank 0: {failure}"
    # What lies on rank zero's device stays there.
    edit = None if made is None else _without_tensors(made)
    edit, message = hand_round((edit, message))
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(message)
    plan = made or edit
    assert plan is not None
    if plan.refitted is not None:
        moves = _hand_moves_round(plan.refitted.moves, targets.layout)
        plan = replace(plan, refitted=replace(plan.refitted, moves=moves))
    return plan, planned


def _without_tensors(plan: Plan) -> Plan:
    """Return what of a plan is handed round as objects; of a refit the names of what it moves."""
    refitted = plan.refitted and replace(
        plan.refitted, moves=dict.fromkeys(plan.refitted.moves, torch.empty(0))
    )
    return replace(plan, batches=[], samples=[], comparison=None, attribution=None, refitted=refitted)


def _hand_moves_round(moves: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
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


def hand_round(value: T) -> T:
    """Return rank zero's value on every rank; it may hold no tensor on a device."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
