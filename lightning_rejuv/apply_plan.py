"""Doing what was planned: every parameter, buffer and copy of them fused, reset and shifted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_rejuv.config import Options
from lightning_rejuv.names import canonical_name, listing
from lightning_rejuv.plan import Plan
from lightning_rejuv.weights.edit import lerp_, lerp_measuring_, reset_neurons, shift_
from lightning_rejuv.weights.optimizer_checks import check_optimizer_weights
from lightning_rejuv.weights.optimizer_state import check_optimizer_state
from lightning_rejuv.weights.optimizer_weights import WeightCopies
from lightning_rejuv.weights.rounding import random_stream
from lightning_rejuv.weights.targets import Targets


class RejuvenationError(RuntimeError):
    """An edit that could not be finished; says which parameters were changed and which were not."""


def find_copies(targets: Targets, optimizers: Iterable[Optimizer], options: Options) -> WeightCopies:
    """Check the optimizers, and find the copies of the weights that they hold; change nothing.

    Raises:
        ValueError: an optimizer's state cannot be edited as it has to be.
    """
    optimizers = list(optimizers)
    check_optimizer_state(targets.layout, options.optimizer_state, optimizers)
    check_optimizer_weights(optimizers, targets.layout)
    copies = WeightCopies.find(optimizers, targets.layout)
    if copies and targets.dora:
        raise ValueError(
            "Expected an optimizer without copies of the weights with DoRA adapters, whose lengths are fused by no "
            "lerp of their own, but its state holds "
            f"{listing(key for _, keys in copies.keys for key in keys)}. Call `model.merge_and_unload()` before."
        )
    return copies


@torch.no_grad()
def apply_plan(
    targets: Targets, plan: Plan, options: Options, copies: WeightCopies | None = None
) -> tuple[float, float]:
    """Fuse every parameter and floating buffer, reset the planned neurons in them, and add what a refit moved.

    Args:
        targets: the parameters, and what they are pulled toward.
        plan: what to change.
        options: the rounding, the weight of the anchor on reset neurons and the seed.
        copies: of the parameters, in the states of optimizers; they are edited alike.

    Returns:
        What rounding did to the fusion of the half-precision parameters: the numbers of
        :func:`lightning_rejuv.weights.edit.rounding_sums`.

    Raises:
        RejuvenationError: an anchor's tensor could not be read or written.
        KeyboardInterrupt: it was interrupted. Like the other it says what has been changed.
    """
    resets = plan.parts()
    omega = options.reset.omega if options.reset else 0.0
    fused = {name for name, share in plan.alphas.items() if share < 1}
    sums: list[Tensor] = []
    done: list[str] = []
    try:
        for name, shard in targets.layout.walk(fused.union(resets), write=True):
            if not targets.pull(name, plan.alphas.get(name, 1.0)):
                weight = 1.0 - plan.alphas.get(name, 1.0)
                anchor = targets.anchor_of(name)
                generator = _generator(options, name, shard.values.device, shard.offset)
                rounding = lerp_measuring_(shard.values, shard.of(anchor), weight, generator)
                sums.append(rounding if shard.copies == 1 else rounding / shard.copies)
                for group, dim, index in resets.get(name, ()):
                    reset_neurons(shard, anchor, group, dim, index, omega, generator)
            done.append(name)
        for name, buffer in targets.buffers.fused.items():
            if name in fused:
                weight, generator = 1.0 - plan.alphas[name], _generator(options, name, buffer.device)
                lerp_(buffer, targets.anchor_of(name), weight, generator=generator)
                done.append(name)
        for name, copy, displacement in copies.walk(fused.union(resets)) if copies else ():
            anchor = targets.anchor_of(name)
            anchor = torch.zeros_like(anchor) if displacement else anchor
            generator = _generator(options, name, copy.values.device, copy.offset)
            lerp_(copy.values, copy.of(anchor), 1.0 - plan.alphas.get(name, 1.0), generator=generator)
            for group, dim, index in resets.get(name, ()):
                reset_neurons(copy, anchor, group, dim, index, omega, generator)
        shift_all(targets, plan.moves, options, copies)
        torch.clear_autocast_cache()  # copies of the weights as they were before the edit
        total = targets.layout.total(_read(sums))
    except (Exception, KeyboardInterrupt) as error:
        said = f": {error}" if str(error) else ""
        stopped = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RejuvenationError
        raise stopped(
            f"The edit stopped with {type(error).__name__}{said}. Edited by then: {len(done)} of "
            f"{len(fused.union(resets))} parameters, the last of them {done[-1:] or None}. Load the model again."
        ) from error
    return float(total[0]), float(total[1])


def _read(sums: list[Tensor]) -> Tensor:
    """Add up ``[2, n]`` of every parameter in float64, on the CPU: until here nothing has waited for a device."""
    together: dict[torch.device, list[Tensor]] = {}
    for one in sums:
        together.setdefault(one.device, []).append(one)
    none = torch.zeros(2, dtype=torch.float64, device="cpu")
    return sum((torch.cat(some, 1).cpu().double().sum(1) for some in together.values()), none)


@torch.no_grad()
def shift_all(
    targets: Targets, moves: Mapping[str, Tensor], options: Options, copies: WeightCopies | None = None
) -> None:
    """Move the parameters by what a refit found, and their copies alike; a sum of gradients keeps its length.

    Args:
        targets: the parameters, edited.
        moves: by name of the parameter what is added to it, in float32 or better.
        options: the rounding and the seed.
        copies: of the parameters, in the states of optimizers.
    """
    for name, move in moves.items():
        parameter = targets.layout.parameters[name].detach()
        shift_(parameter, move, refit_stream(options, name, parameter.device))
    for name, copy, displacement in copies.walk(moves) if copies and moves else ():
        if not displacement:
            shift_(copy.values, moves[name], refit_stream(options, name, copy.values.device))


def refit_stream(options: Options, name: str, device: torch.device) -> torch.Generator | None:
    """Return what a refitted parameter is rounded with, always from its start; None for rounding to nearest."""
    return _generator(options, f"{name} refitted", device)


def _generator(
    options: Options, name: str, device: torch.device, offset: tuple[int, ...] = ()
) -> torch.Generator | None:
    """Return a stream of its own for each parameter, and for each part of it that processes hold.

    Equal parts have equal streams. Beside other processes it is drawn on the CPU, since GPUs of different kinds draw
    different numbers.
    """
    if options.rounding == "nearest":
        return None
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return random_stream(
        f"{options.seed} {canonical_name(name)} {offset}", torch.device("cpu") if several else device
    )
