from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rejuv.ops import lerp
from lightning_rejuv.weights import edit
from lightning_rejuv.weights.edit import (
    lerp_,
    lerp_measuring_,
    rounding_sums,
    shift_,
)

without_kernels = pytest.mark.skipif(
    lerp.kernels_on(torch.device("cpu")), reason="kernels edit the weights of this process"
)


def _measured(*args):
    """What rounding did in a fusion, in all."""
    return lerp_measuring_(*args).double().sum(1)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _pair(shape, dtype, base_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda d: torch.randn(shape, generator=generator, dtype=torch.float64).to(d)  # noqa: E731
    return make(dtype), make(base_dtype)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    base_dtype=st.sampled_from(DTYPES),
    weight=st.floats(0, 1),
)
def test_whole_tensor_is_the_float64_lerp_rounded_once(shape, dtype, base_dtype, weight):
    param, base = _pair(shape, dtype, base_dtype)
    expected = param.double() + weight * (base.double() - param.double())
    kept = base.clone()
    lerp_(param, base, weight)
    assert torch.equal(base, kept)
    # Half types differ from the exact value by half a unit in the last place of the result, float32 and
    # float64 by the rounding of a few operations on values of order one.
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22, torch.float64: 2**-22}[dtype]
    torch.testing.assert_close(param.double(), expected, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_exact(dtype):
    param, base = _pair((4, 3), dtype, dtype)
    before = param.clone()
    param[0, 0] = before[0, 0] = -0.0
    assert torch.equal(lerp_(param, base, 0.0).view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(lerp_(param, base, 1.0), base)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    dim=st.integers(0, 1),
    weight=st.sampled_from([0.3, 1.0]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_only_the_indexed_rows_or_columns_move(rows, columns, dim, weight, transposed, data):
    param, base = _pair((rows, columns), torch.float32, torch.float32)
    if transposed:  # a view that is not contiguous
        param, base = param.t(), base.t()
    size = param.shape[dim]
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1)))), dtype=torch.int64)
    expected = param.clone()
    for i in index.tolist():
        place = (i,) if dim == 0 else (slice(None), i)
        expected[place] = (1 - weight) * param[place] + weight * base[place]
    pointer = param.data_ptr()
    lerp_(param, base, weight, dim=dim, index=index)
    assert param.data_ptr() == pointer
    torch.testing.assert_close(param, expected)
    untouched = [i for i in range(size) if i not in index.tolist()]
    assert torch.equal(
        param.index_select(dim, torch.tensor(untouched, dtype=torch.int64)),
        expected.index_select(dim, torch.tensor(untouched, dtype=torch.int64)),
    )


def test_a_parameter_that_requires_grad_is_edited_in_place():
    layer = torch.nn.Linear(2, 2)
    lerp_(layer.weight, torch.zeros(2, 2), 1.0, index=torch.tensor([1]))
    assert layer.weight.requires_grad
    assert layer.weight[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=r"`weight` to lie in \[0, 1\]"):
        lerp_(torch.ones(1), torch.ones(1), weight)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 2\) but got \(2,\)"):
        lerp_(torch.ones(2, 2), torch.ones(2), 0.5)


def test_stochastic_rounding_is_right_on_average_and_never_far():
    param = torch.full((40000,), 1.0, dtype=torch.bfloat16)
    base = torch.full((40000,), 1.0078125, dtype=torch.bfloat16)  # the next bfloat16 after 1
    generator = torch.Generator().manual_seed(0)
    lerp_(param, base, 0.25, generator=generator)
    assert set(param.tolist()) == {1.0, 1.0078125}
    share = float((param == base).float().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 40000) ** 0.5
    for value in (-3.7, 1e-30, 250.1):
        rounded = lerp_(
            torch.tensor([value]).bfloat16(), torch.tensor([value * 1.3]), 0.5, generator=generator
        )
        exact = 0.5 * (float(torch.tensor(value).bfloat16()) + value * 1.3)
        assert abs(float(rounded) - exact) <= 2**-7 * abs(exact)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_stochastic_rounding_leaves_the_ends_alone(weight):
    param, base = _pair((50,), torch.bfloat16, torch.bfloat16)
    expected = base if weight else param.clone()
    lerp_(param, base, weight, generator=torch.Generator().manual_seed(0))
    assert torch.equal(param, expected)


@pytest.mark.parametrize(
    ("dtype", "base_dtype"), [(torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_float64_is_not_rounded_on_the_way(dtype, base_dtype):
    param, base = _pair((50, 20), dtype, base_dtype)
    expected = torch.lerp(param.double(), base.double(), 0.3)
    lerp_(param, base, 0.3)
    torch.testing.assert_close(param.double(), expected.to(dtype).double(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", [14, 1 << 20])
def test_what_rounding_did_is_that_of_float64(monkeypatch, base_dtype, piece):
    """In pieces as if they were one, with weights that do not differ and some that do by a step or two."""
    param, base = _pair((9, 7), torch.bfloat16, base_dtype)
    base = torch.where(base.abs() < 1, param.to(base_dtype), base)
    base[::2] = (param * 1.01)[::2].to(base_dtype)
    whole = lerp_(param.clone(), base, 0.3)
    w, b, r = (t.double() for t in (param, base, whole))
    expected = float(((b - w) * (0.7 * w + 0.3 * b - r)).sum()), float((b - w).square().sum())
    monkeypatch.setattr(edit, "_PIECE_ON_CPU", piece)
    fused = param.clone()
    found = _measured(fused, base, 0.3)
    assert found == pytest.approx(expected, rel=1e-3)
    assert torch.equal(fused, whole)
    assert torch.equal(lerp_(param, base, 0.3), whole)


@without_kernels
def test_of_a_large_tensor_every_eighth_row_is_looked_at(monkeypatch):
    param, base = _pair((40, 7), torch.bfloat16, torch.bfloat16)
    base[3:] = (param * 1.01)[3:]
    some = _measured(param[::8].clone(), base[::8], 0.3)
    monkeypatch.setattr(edit, "_SAMPLED", 200)
    fused = param.clone()
    assert _measured(fused, base, 0.3) == pytest.approx(some)
    assert torch.equal(fused, lerp_(param, base, 0.3))


@pytest.mark.parametrize(
    ("alpha", "shift"), [(0.1, -0.1), (0.4, -0.4), (0.6, 0.4), (0.9, 0.1)], ids=lambda value: f"{value:g}"
)
def test_the_shift_of_alpha_where_the_two_are_neighbours_in_bfloat16(alpha, shift):
    """To nearest every weight becomes one of the two; stochastically they keep alpha, with a longer error."""
    base = torch.full((40000,), 1.0, dtype=torch.bfloat16)
    sft = torch.full((40000,), 1.0078125, dtype=torch.bfloat16)
    gap, line = _measured(sft.clone(), base, 1 - alpha)
    assert gap / line == pytest.approx(shift, abs=1e-4)
    gap, line = _measured(sft.clone(), base, 1 - alpha, torch.Generator().manual_seed(0))
    assert abs(gap / line) < 5 * (alpha * (1 - alpha) / 40000) ** 0.5


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_a_shift_of_alpha_is_positive_toward_the_model(alpha):
    sft, base = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])
    exact = alpha * sft + (1 - alpha) * base
    assert rounding_sums(sft, base, exact, sft).tolist() == [1 - alpha, 1.0]
    assert rounding_sums(sft, base, exact, base).tolist() == [-alpha, 1.0]
    assert rounding_sums(sft, base, exact, exact).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("edited", [lerp_, lerp_measuring_])
def test_large_tensors_are_rounded_stochastically_too(monkeypatch, edited):
    monkeypatch.setattr(edit, "_PIECE_ON_CPU", 100)
    param = torch.full((40, 1000), 1.0, dtype=torch.bfloat16)
    base = torch.full((40, 1000), 1.0078125, dtype=torch.bfloat16)
    edited(param, base, 0.25, generator=torch.Generator().manual_seed(0))
    share = float((param == base).float().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 40000) ** 0.5


@pytest.mark.parametrize("contiguous", [True, False])
def test_pieces_are_neither_rows_nor_copies(monkeypatch, contiguous):
    """Long rows are split, short ones are put together; where memory has them in another order, whole rows go."""
    monkeypatch.setattr(edit, "_PIECE_ON_CPU", 100)
    for shape in ((3, 250), (500, 2), (7,), ()):
        param, base = _pair(shape, torch.float32, torch.bfloat16)
        if not contiguous and len(shape) == 2:
            param, base = param.t().contiguous().t(), base.t().contiguous().t()
        expected = torch.lerp(param.double(), base.double(), 0.3)
        sizes = [piece.numel() for piece, _ in edit._pieces(param, base)]
        assert sum(sizes) == param.numel()
        assert max(sizes) <= (750 if shape == (3, 250) and not contiguous else 100)
        pointer = param.data_ptr()
        assert lerp_(param, base, 0.3).data_ptr() == pointer
        torch.testing.assert_close(param.double(), expected, rtol=1e-6, atol=1e-6)


@without_kernels
def test_small_pieces_are_computed_in_one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = set()
    original = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda *args: seen.add(torch.get_num_threads()) or original(*args))
    try:
        lerp_(torch.ones(1 << 17), torch.ones(1 << 17, dtype=torch.bfloat16), 0.5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == {1}


class Operations(TorchDispatchMode):
    """Counts the operations that a device is given."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@without_kernels
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 12), (torch.bfloat16, 32)])
def test_a_matrix_whose_dtype_differs_takes_a_few_operations(dtype, most):
    """On a device without kernels, views counted too; nothing is read back, which ``meta`` would refuse."""
    param = torch.empty(4096, 4096, dtype=dtype, device="meta")
    base = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    with Operations() as operations:
        lerp_(param, base, 0.3, generator=torch.Generator())
    assert operations.count <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_shift_is_added_exactly_and_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(50, 7, generator=generator, dtype=torch.float64).to(dtype)
    move = torch.randn(50, 7, generator=generator, dtype=torch.float32) / 100
    before, kept = parameter.clone(), move.clone()
    assert shift_(parameter, move) is parameter
    exact = before.to(torch.promote_types(dtype, torch.float32)) + move
    assert torch.equal(parameter, exact.to(dtype))
    assert torch.equal(move, kept)
    with pytest.raises(ValueError, match=r"`move` to have shape \(50, 7\) but got \(7, 50\)"):
        shift_(parameter, move.T)


def test_a_small_shift_of_bfloat16_survives_stochastic_rounding_on_average():
    parameter = torch.ones(1 << 15, dtype=torch.bfloat16)
    shift_(parameter, torch.full((1 << 15,), 1e-3), torch.Generator().manual_seed(0))
    assert float(parameter.double().mean()) == pytest.approx(1.001, abs=1e-4)


@pytest.mark.parametrize("columns", [3, 401, 7000])
def test_another_order_in_memory_is_rounded_alike(columns):
    """As a parameter that is a view, and the copy of it that an optimizer holds."""
    wide = torch.randn(90, 2 * columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = (1.01 * wide[:, ::2]).to(torch.bfloat16)
    view, copy = wide[:, ::2], wide[:, ::2].contiguous()
    for tensor in (view, copy):
        lerp_(tensor, base, 0.6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(view, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autograd_sees_that_a_weight_was_edited(dtype):
    weight = torch.ones(8, dtype=dtype, requires_grad=True)
    loss = weight.square().sum()
    lerp_(weight.detach(), torch.zeros(8), 0.5, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
