"""One plan for all processes: rank zero makes it and hands it round, so that every rank makes the same edit."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from lightning_rejuv.access.replica import Replica, make_replica
from lightning_rejuv.access.targets import Targets
from lightning_rejuv.options import Options
from lightning_rejuv.plan import Data, Plan, make_plan

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
    edit = None if made is None else replace(made, batches=[], comparison=None, attribution=None)
    edit, message = hand_round((edit, message))
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(message)
    plan = made or edit
    assert plan is not None
    return plan, planned


def hand_round(value: T) -> T:
    """Return rank zero's value on every rank; it may hold no tensor on a device."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
