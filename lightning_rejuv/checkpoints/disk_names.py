"""Where the selected or trained weights of a model in memory lie on disk: transformers' conversion, run backwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.checkpoints.models import to_disk_layout
from lightning_rejuv.checkpoints.reader import Checkpoint, grid
from lightning_rejuv.names import listing


@dataclass(frozen=True)
class Pattern:
    """A selection of a tensor's weights, kept small: a few kinds of rows, and the kind of each row.

    Rows are those of :func:`lightning_rejuv.checkpoints.reader.grid`.

    Attributes:
        kinds: [K, C] bool, the distinct rows of the selection.
        of_row: [R] int64, the kind of every row.
    """

    kinds: Tensor
    of_row: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the selection in some rows: [stop - start, C] bool."""
        return self.kinds[self.of_row[start:stop]]

    @property
    def count(self) -> int:
        """Number of selected weights."""
        return int(self.kinds.sum(dim=1)[self.of_row].sum())


def pattern_of(mask: Tensor) -> Pattern:
    """Compress a mask of selected rows, columns, or blocks of them to a pattern.

    Args:
        mask: bool, any shape; a vector is taken as a column.

    >>> pattern = pattern_of(torch.tensor([[True, False], [True, False], [True, True]]))
    >>> pattern.rows(1, 3), pattern.count
    (tensor([[ True, False],
            [ True,  True]]), 4)
    """
    table = mask.reshape(-1, mask.shape[-1]) if mask.dim() > 1 else mask.reshape(-1, 1)
    # Equal rows have equal sums of random 64-bit words; that two different ones do has odds of 2^-64.
    words = torch.randint(-(2**62), 2**62, (table.shape[1],), generator=torch.Generator().manual_seed(0))
    keys = torch.cat([torch.where(part, words, 0).sum(dim=1) for part in table.split(256)])
    unique, of_row = keys.unique(return_inverse=True)
    first = torch.full((len(unique),), len(keys)).scatter_reduce(
        0, of_row, torch.arange(len(keys)), reduce="amin"
    )
    return Pattern(table[first].clone(), of_row)


def on_disk(model: nn.Module, checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> dict[str, Pattern]:
    """Find the weights on disk that masks of parameters in memory select.

    Args:
        model: the model as it was loaded from the checkpoint.
        checkpoint: the files.
        masks: bool, in the shape of the parameter, for some of the model's parameters.

    Raises:
        ValueError: a parameter has no tensor of its own on disk; it is named.
    """
    placed = _placed(model, checkpoint, masks, "neurons to reset", "pass `reset=None`")
    found = {name: pattern_of(mask) for name, mask in placed.items()}
    selected = sum(int(mask.sum()) for mask in masks.values())
    if selected != sum(pattern.count for pattern in found.values()):
        raise ValueError(
            f"Expected the {selected} selected weights of {listing(masks)} on disk but found "
            f"{sum(p.count for p in found.values())}: this family stores them in a form that is not known. "
            "Pass `reset=None` for fusion alone."
        )
    return found


def moves_on_disk(model: nn.Module, checkpoint: Checkpoint, moves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the weights on disk that a refit moves; a head that is stored beside the embedding it is tied to moves, too.

    Args:
        model: the model as it was loaded from the checkpoint.
        checkpoint: the files.
        moves: float32, in the shape of the parameter, for some of the model's parameters.

    Returns:
        The moves by name on disk, in the CPU's memory, rows and columns as
        :func:`lightning_rejuv.checkpoints.reader.grid` has them.

    Raises:
        ValueError: a parameter has no tensor of its own on disk; it is named.
    """
    moves = {name: move.cpu() for name, move in moves.items()}
    found = _placed(model, checkpoint, moves, "weights that the refit trained", "leave `refit` out")
    count, placed = (sum(int(m.count_nonzero()) for m in some.values()) for some in (moves, found))
    if count != placed:
        raise ValueError(
            f"Expected the {count} weights that the refit moved on disk but found {placed}: this family stores them in "
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
    """Return tensors of some parameters as they lie on disk, without those that are zero everywhere.

    Raises:
        ValueError: a tensor has no place on disk of its name and shape; ``what`` and ``instead`` are of the message.
    """
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
