"""Names and layouts on disk of what a model in memory selects: transformers' conversion, run backwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.checkpoints.checkpoint import Checkpoint
from lightning_rejuv.checkpoints.pattern import Pattern, pattern_of
from lightning_rejuv.checkpoints.stream import grid
from lightning_rejuv.names import listing


def to_disk_layout(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model's parameters as ``save_pretrained`` would store them.

    Fused experts are taken apart, renamed weights get their name on disk, transposed ones are turned back.
    Works for masks and for tensors without data, too: layouts differ by permutations only.
    """
    from transformers import core_model_loading

    return dict(core_model_loading.revert_weight_conversion(model, dict(state)))


def on_disk(model: nn.Module, checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> dict[str, Pattern]:
    """Find the weights on disk that masks of parameters in memory select.

    Args:
        model: the model as it was loaded from the checkpoint.
        checkpoint: the files.
        masks: bool, in the shape of the parameter, for some of the model's parameters.

    Raises:
        ValueError: a parameter has no tensor of its own on disk; it is named.
    """
    found = {
        name: pattern_of(mask)
        for name, mask in _placed(model, checkpoint, masks, "neurons to reset", "pass `reset=None`").items()
    }
    selected = sum(int(mask.sum()) for mask in masks.values())
    if selected != sum(pattern.count for pattern in found.values()):
        raise ValueError(
            f"Expected the {selected} selected weights of {listing(masks)} on disk but found "
            f"{sum(p.count for p in found.values())}: this family stores them in a form that is not known. "
            "Pass `reset=None` for fusion alone."
        )
    return found


def moves_on_disk(model: nn.Module, checkpoint: Checkpoint, moves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find what a refit moves on disk; a head that is stored beside the embedding it is tied to moves with it.

    Args:
        model: the model as it was loaded from the checkpoint.
        checkpoint: the files.
        moves: float32, in the shape of the parameter, for some of the model's parameters.

    Returns:
        By name on disk, in the CPU's memory, rows and columns as
        :func:`lightning_rejuv.checkpoints.stream.grid` has them.

    Raises:
        ValueError: a parameter has no tensor of its own on disk; it is named.
    """
    moves = {name: move.cpu() for name, move in moves.items()}
    found = _placed(model, checkpoint, moves, "weights that the refit trained", "leave `refit` out")
    count, there = (sum(int(m.count_nonzero()) for m in some.values()) for some in (moves, found))
    if count != there:
        raise ValueError(
            f"Expected the {count} weights that the refit moved on disk but found {there}: this family stores them in "
            "a form that is not known. Leave `refit` out."
        )
    twice = {name: moves[source] for name, source in _tied(model).items() if source in moves}
    for name, move in to_disk_layout(model, twice).items() if twice else ():
        if name in checkpoint.place:
            found[name] = move
    return {name: move.reshape(grid(tuple(move.shape))) for name, move in found.items()}


def _tied(model: nn.Module) -> dict[str, Any]:
    """Return the parameters that are tied to another, with the other's name."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _placed(
    model: nn.Module, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], what: str, instead: str
) -> dict[str, Tensor]:
    """Return those of some parameters' tensors that are not zero as they lie on disk, each at a place that is there."""
    tied = _tied(model)
    kind = next((tensor.dtype for tensor in tensors.values()), torch.bool)
    # Zeros take one element, whatever the shape: conversions of several tensors need all of them.
    empty = torch.zeros(1, dtype=kind)
    state = {
        name: tensors.get(name, empty.expand(parameter.shape))
        for name, parameter in model.named_parameters()
        if name not in tied
    }
    found = {name: tensor for name, tensor in to_disk_layout(model, state).items() if bool(tensor.any())}
    for name, tensor in found.items():
        if name not in checkpoint.place or checkpoint.entry(name).shape != tuple(tensor.shape):
            raise ValueError(
                f"The {what} lie in {name!r} {tuple(tensor.shape)}, which {str(checkpoint.path)!r} does not hold in "
                f"that form: it holds {listing(checkpoint.place)}. Save it again with `save_pretrained`, or {instead}."
            )
    return found
