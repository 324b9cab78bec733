"""The public functions of A and B: shapes, strides, merging, errors. Values: ``test_conformance.py``."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_rejuv import ops
from lightning_rejuv.ops import blocked, reference

ROUNDING = {"rtol": 1e-6, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class LargestResult(TorchDispatchMode):
    """Records the size of the largest storage that any operation creates; a view creates none."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        inputs = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in inputs}
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_leading_dimensions_are_tokens():
    h, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4) < 0.5
    found = ops.activation_stats(h, mask, eps=0.1)
    expected = reference.activation_stats(h.view(-1, 5), mask.view(-1), 0.1)
    torch.testing.assert_close(torch.stack(found), expected, **ROUNDING)
    assert found._fields == (
        "abs_sum",
        "signed_sum",
        "square_sum",
        "abs_max",
        "near_zero",
        "positive",
        "tokens",
    )


def test_single_token_and_integer_mask():
    h = torch.tensor([1.0, -2.0])
    assert ops.activation_stats(h).abs_sum.tolist() == [1.0, 2.0]
    mask = torch.tensor([1, 0, 2])
    assert ops.activation_stats(torch.ones(3, 2), mask).tokens.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("cut", [(slice(None), slice(1, None)), (slice(None), slice(None), slice(1, 3))])
def test_strided_input_is_read_where_it_lies(cut, monkeypatch):
    monkeypatch.setattr(blocked, "CPU_BLOCK", 400)
    whole = torch.randn(3, 50, 40)
    h, mask = whole[cut], torch.rand(whole[cut].shape[:-1]) < 0.5
    other = whole.flip(0)[cut]
    with LargestResult() as largest:
        found = ops.activation_stats(h, mask, eps=0.1)
        product = ops.grad_activation_stats(h, other, mask)
    flat, kept = h.reshape(-1, h.shape[-1]), mask.reshape(-1)
    torch.testing.assert_close(torch.stack(found), reference.activation_stats(flat, kept, 0.1), **ROUNDING)
    expected = reference.grad_activation_stats(flat, other.reshape(flat.shape), kept)
    torch.testing.assert_close(torch.stack(product), expected, **ROUNDING)
    assert largest.elements < h.numel() // 4


def test_temporaries_do_not_grow_with_the_input(monkeypatch):
    monkeypatch.setattr(blocked, "CPU_BLOCK", 1 << 10)
    h = torch.randn(4096, 16)
    with LargestResult() as largest:
        ops.activation_stats(h)
        ops.grad_activation_stats(h, h)
        ops.weight_drift(h, h)
        ops.token_stats(h)
    # The input is 64 blocks; four numbers a row leave C and D.
    assert largest.elements == 4 * 4096


def test_accumulator_is_updated_in_place_and_returned_as_views():
    table = torch.zeros(7, 3, dtype=torch.float64)
    for h in (torch.ones(2, 3), torch.full((1, 3), -3.0)):
        found = ops.activation_stats(h, out=table)
    assert found.abs_sum.data_ptr() == table.data_ptr()
    assert table[:, 0].tolist() == [5.0, -1.0, 11.0, 3.0, 0.0, 2.0, 3.0]
    table = torch.ones(4, 3, dtype=torch.float64)
    ops.grad_activation_stats(torch.ones(2, 3), torch.full((2, 3), -2.0), out=table)
    assert table[:, 0].tolist() == [5.0, 5.0, -3.0, 3.0]


def test_counts_stay_exact_where_float32_would_stop():
    table = torch.full((7, 2), 2.0**24, dtype=torch.float64)
    ops.activation_stats(torch.ones(1, 2), out=table)
    assert table[6].tolist() == [2.0**24 + 1] * 2


def test_float64_activations_are_summed_in_float64():
    h = torch.tensor([[1.0], [1e-12]], dtype=torch.float64)
    assert ops.activation_stats(h, eps=1e-12).near_zero.item() == 1.0
    assert ops.activation_stats(h).signed_sum.item() == 1.0 + 1e-12


def test_merge_equals_one_run_over_everything():
    parts = [torch.randn(n, 5) for n in (3, 4)]
    tables = torch.stack([torch.stack(ops.activation_stats(h, eps=0.3)) for h in parts])
    merged = ops.merge_activation_stats(tables)
    torch.testing.assert_close(merged, reference.activation_stats(torch.cat(parts), None, 0.3), **ROUNDING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"h": torch.ones(2, 3, dtype=torch.int64)}, "`h` to be a floating point tensor but got torch.int64"),
        ({"h": torch.tensor(1.0)}, "`h` to have at least one dimension"),
        ({"eps": -0.1}, "`eps` to be a non-negative float but got -0.1"),
        ({"eps": float("nan")}, "`eps` to be a non-negative float but got nan"),
        ({"mask": torch.ones(3)}, r"`mask` to have shape \(2,\).*but got \(3,\)"),
        ({"mask": torch.ones(2, device="meta")}, "`mask` on the device of `h`"),
        ({"out": torch.zeros(6, 3)}, r"`out` to be a contiguous .* of shape \(7, 3\)"),
        ({"out": torch.zeros(7, 3, dtype=torch.bfloat16)}, "`out` to be a contiguous float64 or float32"),
        ({"out": torch.zeros(3, 7).t()}, "`out` to be a contiguous"),
        ({"out": torch.zeros(7, 3, device="meta")}, "`out` on the device of `h`"),
    ],
)
def test_wrong_arguments_of_activation_stats(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.activation_stats(**{"h": torch.ones(2, 3), **arguments})


def test_wrong_gradient_leaves_the_accumulator_alone():
    table = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`grad` to have the shape of `h` \(2, 3\) but got \(3, 2\)"):
        ops.grad_activation_stats(torch.ones(2, 3), torch.ones(3, 2), out=table)
    with pytest.raises(ValueError, match="`tables` to have shape"):
        ops.merge_activation_stats(torch.zeros(7, 3))
    assert not table.any()
