"""Rows of several calibration batches, put together anew: the mini-batches of a training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_rejuv.calibration.batches import Batch, in_parts

_Row = dict[str, Tensor]


class Pool:
    """All rows of some batches, to be drawn from.

    Args:
        batches: checked batches; those that :meth:`draws` yields have no more tokens than the largest of them.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self._rows = [row for batch in batches for row in _rows_of(batch)]
        self._most = max(batch.inputs["input_ids"].numel() for batch in batches)

    def __len__(self) -> int:
        return len(self._rows)

    def draws(self, size: int, count: int, seed: int) -> Iterator[list[Batch]]:
        """Draw so many rows, again and again, each time in as few batches as they fit into.

        All rows are drawn before one comes again.

        Args:
            size: how many rows at a time.
            count: how often.
            seed: of their order.
        """
        for parts in self._draws(size, count, seed):
            yield [_padded(rows) for rows in parts]

    def count(self, size: int, count: int, seed: int) -> int:
        """Return how many batches :meth:`draws` yields in all, for the same arguments."""
        return sum(len(parts) for parts in self._draws(size, count, seed))

    def _draws(self, size: int, count: int, seed: int) -> Iterator[list[list[_Row]]]:
        for numbers in shuffled(len(self), size, count, seed):
            rows = sorted((self._rows[n] for n in numbers), key=_length)
            yield list(in_parts(rows, self._most, _length))


def shuffled(total: int, size: int, count: int, seed: int) -> Iterator[list[int]]:
    """Yield ``size`` of the numbers below ``total``, ``count`` times; all of them come before one comes again.

    >>> [sorted(numbers) for numbers in shuffled(4, 4, 2, seed=0)]
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(count):
        while len(waiting) < size:
            waiting += torch.randperm(total, generator=generator, device="cpu").tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def _length(row: _Row) -> int:
    return len(row["input_ids"])


def _rows_of(batch: Batch) -> Iterator[_Row]:
    """Take a batch apart: each row up to the end of its response, with targets [T - 1] and where they count."""
    for row, length in enumerate(batch.lengths.tolist()):
        tokens = {key: value[row, :length] for key, value in batch.inputs.items() if key != "attention_mask"}
        ends = {"targets": batch.targets[row, : length - 1], "response": batch.response[row, : length - 1]}
        yield {**tokens, **ends}


def _padded(rows: list[_Row]) -> Batch:
    """Put rows together, padded on the right; numbers by token that only some rows have are those taken for granted."""
    count, width, device = len(rows), max(map(_length, rows)), rows[0]["input_ids"].device
    keys = {key for row in rows for key in row}
    whole = {}
    for key in keys:
        kind = torch.bool if key == "response" else torch.int64
        wide = width - (key in ("targets", "response"))
        whole[key] = torch.zeros((count, wide), dtype=kind, device=device)
        if key == "position_ids":
            whole[key] += torch.arange(width, device=device)
        for number, row in enumerate(rows):
            if key in row:
                whole[key][number, : len(row[key])] = row[key]
    targets, response = whole.pop("targets"), whole.pop("response")
    lengths = torch.tensor([_length(row) for row in rows], device=device)
    if int(lengths.min()) < width:
        whole["attention_mask"] = (torch.arange(width, device=device) < lengths[:, None]).long()
    return Batch(whole, targets, response)
