"""A base and an SFT model that are the same model: there is nothing to pull back."""

from __future__ import annotations

import os

import torch

from lightning_rejuv.checkpoints.checkpoint import Reader, reading
from lightning_rejuv.checkpoints.pairing import Pair, Pairing
from lightning_rejuv.checkpoints.stream import grid, one_thread, runs

_PIECE = 1 << 18  # weights that are compared at a time


def check_differ(pairing: Pairing) -> None:
    """Refuse a base that equals the SFT model in every tensor, as :func:`lightning_rejuv.rejuvenate` does.

    Two models that differ are told apart by a few pieces: the first one of every tensor, the small tensors first.
    Only of equal models everything is read, unless their files are the same.

    Raises:
        ValueError: they are equal.
    """
    sft, base = pairing.sft, pairing.base
    fused = [pair for pair in pairing.pairs.values() if pair.base is not None]
    same_files = sft.shards.keys() == base.shards.keys() and all(
        os.path.samefile(sft.path / file, base.path / file) for file in sft.shards
    )
    if not same_files:
        fused.sort(key=lambda pair: sft.entry(pair.name).numel)
        with one_thread(), reading(sft, base) as (ours, theirs):
            for begin in (True, False):
                if any(_differ(pairing, pair, ours, theirs, begin) for pair in fused):
                    return
    raise ValueError(
        f"The base {str(base.path)!r} equals the SFT model {str(sft.path)!r} in every tensor: there is nothing to "
        "pull back. Pass the checkpoint that SFT started from."
    )


def _differ(pairing: Pairing, pair: Pair, ours: Reader, theirs: Reader, begin: bool) -> bool:
    """Whether two tensors differ: in their first piece, or in the others."""
    rows, columns = grid(pairing.sft.entry(pair.name).shape)
    step = max(1, _PIECE // max(1, columns))
    assert pair.base is not None
    for start in range(0, min(rows, step), step) if begin else range(step, rows, step):
        stop = min(rows, start + step)
        mine = ours.read(pair.name, start * columns, (stop - start) * columns).view(-1, columns)
        if pair.rows is None:
            other = theirs.read(pair.base, start * columns, (stop - start) * columns).view(-1, columns)
        else:
            index = pair.rows.rows[start:stop]
            found = [theirs.read(pair.base, first * columns, n * columns) for _, first, n in runs(index)]
            mine, other = mine[index >= 0], torch.cat([mine.new_zeros(0), *found]).view(-1, columns)
        if bool((mine.double() != other.double()).any()):
            return True
    return False
