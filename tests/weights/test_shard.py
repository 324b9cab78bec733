from __future__ import annotations

import pytest
import torch

from lightning_rejuv.weights.shard import Shard


def _part(whole, rows, columns):
    values = whole[rows, columns].clone()
    return Shard(values, whole.shape, (rows.start, columns.start))


WHOLE = torch.arange(35.0).view(7, 5)


@pytest.mark.parametrize("rows", [slice(0, 7), slice(2, 5), slice(5, 7), slice(3, 3)])
@pytest.mark.parametrize("columns", [slice(0, 5), slice(1, 2)])
def test_it_cuts_the_same_part_out_of_another_tensor(rows, columns):
    shard, other = _part(WHOLE, rows, columns), WHOLE + 100
    assert torch.equal(shard.of(other), other[rows, columns])


@pytest.mark.parametrize(
    "rows", [slice(0, 7), slice(0, 3), slice(2, 5), slice(4, 7), slice(5, 7), slice(7, 7)]
)
@pytest.mark.parametrize("available", [4, 7, 9])
def test_rows_of_a_resized_vocabulary(rows, available):
    shard = _part(WHOLE, rows, slice(0, 5))
    other = torch.arange(available * 5.0).view(available, 5) + 100
    expected = WHOLE.clone()
    expected[: min(7, available)] = other[:7]
    assert torch.equal(shard.of(other), expected[rows])


def test_a_view_is_returned_where_that_is_possible():
    other = WHOLE.clone()
    assert _part(WHOLE, slice(2, 5), slice(0, 5)).of(other).data_ptr() == other[2].data_ptr()
    assert Shard.whole(WHOLE).of(other) is other


@pytest.mark.parametrize("dim", [0, 1])
def test_positions_elsewhere_are_dropped(dim):
    shard = _part(WHOLE, slice(2, 5), slice(1, 3))
    index = torch.tensor([0, 1, 2, 3, 4])
    marked = torch.zeros_like(WHOLE).index_fill_(dim, index[1:4], 1.0)
    filled = torch.zeros_like(shard.values).index_fill_(dim, shard.local(index[1:4], dim), 1.0)
    assert torch.equal(filled, marked[2:5, 1:3])


def test_experts_that_lie_here_and_elsewhere():
    whole = torch.arange(24.0).view(4, 2, 3)
    shard = Shard(whole[1:3], whole.shape, (1, 0, 0), copies=2)
    assert shard.expert(None) is shard
    assert shard.expert(0) is None
    assert shard.expert(3) is None
    piece = shard.expert(2)
    assert torch.equal(piece.values, whole[2])
    assert (piece.shape, piece.offset, piece.copies) == ((2, 3), (0, 0), 2)
    piece.values.zero_()
    assert not whole[2].any()


def test_a_scalar_parameter():
    assert float(Shard.whole(torch.tensor(2.0)).of(torch.tensor(3.0))) == 3.0
