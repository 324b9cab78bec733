"""The public function of C: shapes, dtypes, shards, errors. Values: ``test_conformance.py``."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv import ops


def test_small_matrix_by_hand():
    drift = ops.weight_drift(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 8.0]]))
    assert drift.rows.drift_square.tolist() == [4.0, 25.0]
    assert drift.rows.weight_square.tolist() == [5.0, 25.0]
    assert drift.rows.base_square.tolist() == [1.0, 64.0]
    assert drift.rows.drift_max.tolist() == [2.0, 4.0]
    assert drift.columns.drift_square.tolist() == [9.0, 20.0]
    assert drift.columns.weight_square.tolist() == [10.0, 20.0]
    assert drift.columns.base_square.tolist() == [1.0, 64.0]
    assert drift.columns.drift_max.tolist() == [3.0, 4.0]


def test_small_drift_of_large_weights_keeps_its_digits():
    """The difference is squared itself, not taken from the squared norms, which would cancel."""
    base = torch.full((4, 1000), 100.0)
    drift = ops.weight_drift(base + 2.0**-10, base)
    assert drift.rows.drift_square.tolist() == [1000 * 2.0**-20] * 4


def test_float64_weights_and_mixed_dtypes():
    base = torch.ones(2, 3)
    weight = base.double() + 1e-12
    assert ops.weight_drift(weight, base).rows.drift_max[0].item() == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrix_has_not_drifted(shape):
    drift = ops.weight_drift(torch.ones(shape), torch.ones(shape))
    assert [x.shape for x in (drift.rows.drift_max, drift.columns.drift_max)] == [(shape[0],), (shape[1],)]
    assert not torch.cat([*drift.rows, *drift.columns]).any()


def test_row_shards_merge():
    """FSDP2's Shard(0): rows are local, columns add up, their maxima take the maximum."""
    weight, base = torch.randn(7, 5), torch.randn(7, 5)
    whole = ops.weight_drift(weight, base)
    shards = [ops.weight_drift(weight[s], base[s]) for s in (slice(0, 4), slice(4, 7))]
    for name in whole.rows._fields:
        rows, columns = ([getattr(part, name) for part in side] for side in zip(*shards, strict=True))
        merged = torch.stack(columns).amax(0) if name == "drift_max" else torch.stack(columns).sum(0)
        torch.testing.assert_close(torch.cat(rows), getattr(whole.rows, name))
        torch.testing.assert_close(merged, getattr(whole.columns, name))


@pytest.mark.parametrize(
    ("weight", "base", "message"),
    [
        (
            torch.ones(3),
            torch.ones(3),
            r"`weight` to be a matrix \[R, C\] but got shape \(3,\).*weight\[:, None\]",
        ),
        (
            torch.ones(2, 3),
            torch.ones(3, 2),
            r"`base` to have the shape of `weight` \(2, 3\) but got \(3, 2\)",
        ),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), "`base` on the device of `weight`"),
        (torch.ones(2, 3), torch.ones(2, 3).int(), "`base` to be a floating point tensor"),
    ],
)
def test_wrong_arguments(weight, base, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.weight_drift(weight, base)
