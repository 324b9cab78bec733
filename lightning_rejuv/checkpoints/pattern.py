"""A selection of a tensor's weights on disk, kept small: a few kinds of rows, and the kind of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which weights of a tensor are selected, over the tensor as rows of its last dimension.

    Attributes:
        kinds: [K, C] bool, the distinct rows of the selection.
        of_row: [R] int64, the kind of every row.
    """

    kinds: Tensor
    of_row: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """The selection in some rows: [stop - start, C] bool."""
        return self.kinds[self.of_row[start:stop]]

    @property
    def count(self) -> int:
        """Number of selected weights."""
        return int(self.kinds.sum(dim=1)[self.of_row].sum())


def pattern_of(mask: Tensor) -> Pattern:
    """Compress a mask of selected rows, columns, or blocks of them.

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
