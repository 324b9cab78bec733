"""The part of a parameter that this process holds, as a plain tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A rectangular part of a parameter, or all of it.

    Attributes:
        values: the part, a plain tensor; what is written into it is written into the parameter.
        shape: the whole parameter's.
        offset: where the part begins, for each dimension.
        copies: how many processes hold this part; a sum over all processes counts it so often.

    >>> lower = Shard(torch.zeros(2, 3), shape=torch.Size([4, 3]), offset=(2, 0))
    >>> lower.of(torch.arange(12).view(4, 3))
    tensor([[ 6,  7,  8],
            [ 9, 10, 11]])
    >>> lower.local(torch.tensor([0, 3]), dim=0)
    tensor([1])
    """

    values: Tensor
    shape: torch.Size
    offset: tuple[int, ...]
    copies: int = 1

    @classmethod
    def whole(cls, values: Tensor) -> Shard:
        """Describe a tensor that is held whole."""
        return cls(values, values.shape, (0,) * values.dim())

    def of(self, tensor: Tensor) -> Tensor:
        """Return what another tensor of the whole shape has where this part lies: a view if that is possible.

        A vocabulary may have been resized: rows that ``tensor`` does not have are taken from this part
        itself, and rows that the parameter does not have are left out.

        Args:
            tensor: of the whole shape, but perhaps with another number of rows.
        """
        for dim in range(1, self.values.dim()):
            tensor = _cut(tensor, dim, self.offset[dim], self.values.shape[dim])
        if self.values.dim() == 0:
            return tensor
        first, count = self.offset[0], len(self.values)
        common = min(max(len(tensor) - first, 0), count)
        rows = _cut(tensor, 0, min(first, len(tensor)), common)
        if common == count:
            return rows
        return torch.cat([rows, self.values[common:].to(rows.device, rows.dtype)])

    def expert(self, number: int | None) -> Shard | None:
        """Return one expert's slice of a stacked weight; this part itself for None.

        Args:
            number: which expert of the whole parameter.

        Returns:
            None if this part does not hold the expert.
        """
        if number is None:
            return self
        row = number - self.offset[0]
        if not 0 <= row < len(self.values):
            return None
        return Shard(self.values[row], self.shape[1:], self.offset[1:], self.copies)

    def local(self, index: Tensor, dim: int) -> Tensor:
        """Turn positions in the whole parameter into positions in this part; those elsewhere are dropped.

        Args:
            index: 1-D int64.
            dim: the dimension that it counts along.
        """
        local = index - self.offset[dim]
        return local[(local >= 0) & (local < self.values.shape[dim])]


def _cut(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    return tensor if tensor.shape[dim] == length else tensor.narrow(dim, start, length)
