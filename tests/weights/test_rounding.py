from __future__ import annotations

import math

import pytest
import torch

from lightning_rejuv.weights import rounding
from lightning_rejuv.weights.rounding import random_stream, round_stochastically

HALF = [torch.bfloat16, torch.float16]


def _every_number(dtype):
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def _around(value, dtype):
    """The numbers of a half type right below and above a value, by search in the list of all of them."""
    numbers = _every_number(dtype).double()
    numbers = numbers[numbers.isfinite()]
    return float(numbers[numbers <= value].max()), float(numbers[numbers >= value].min())


@pytest.mark.parametrize("exact", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALF)
def test_every_number_of_the_dtype_stays_as_it_is(dtype, exact):
    """Zeros of both signs, subnormals, the largest finite numbers and infinity too; NaN stays NaN."""
    numbers = _every_number(dtype)
    for seed in range(5):
        rounded = round_stochastically(numbers.to(exact), dtype, torch.Generator().manual_seed(seed))
        assert rounded.dtype == dtype
        assert torch.equal(rounded.isnan(), numbers.isnan())
        stays = ~numbers.isnan()
        assert torch.equal(rounded[stays].view(torch.int16), numbers[stays].view(torch.int16))


VALUES = [
    1.003,
    -1.003,
    0.9999,
    -0.7001,
    1.99999,
    3e-5,
    -6.1e-5,
    6.103e-5,
    1e-6,
    -4.2e-7,
    2e-8,
    0.0123,
    250.1,
]


@pytest.mark.parametrize("value", [*VALUES, 3e-39, -1e-40, 6e4])
@pytest.mark.parametrize("dtype", HALF)
def test_over_all_random_bits_the_mean_is_the_value(monkeypatch, dtype, value):
    """Every draw once: the mean is exact; below the normal numbers of float16 to 2^-13 of a step."""
    every = torch.arange(1 << 16).to(torch.int16)
    monkeypatch.setattr(rounding, "_random_bits", lambda count, _: every[:count])
    exact = torch.tensor(value)
    rounded = round_stochastically(exact.expand(1 << 16), dtype, torch.Generator()).double()
    low, high = _around(exact.double(), dtype)
    assert {low, high}.issuperset(rounded.tolist())
    normal = dtype == torch.bfloat16 or abs(value) >= torch.finfo(dtype).smallest_normal
    assert abs(float(rounded.mean() - exact.double())) <= (0 if normal else (high - low) * 2**-13)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", HALF)
def test_over_many_draws_the_mean_is_the_value(dtype, value):
    count = 40_000
    exact = torch.tensor(value)
    drawn = torch.Generator().manual_seed(1)
    rounded = round_stochastically(exact.expand(count), dtype, drawn).double()
    low, high = _around(exact.double(), dtype)
    assert {low, high}.issuperset(rounded.tolist())
    assert abs(float(rounded.mean()) - exact.double().item()) <= 5 * 0.5 * (high - low) / math.sqrt(count)


@pytest.mark.parametrize("dtype", HALF)
def test_all_magnitudes_become_a_neighbour(dtype):
    generator = torch.Generator().manual_seed(0)
    largest = torch.finfo(dtype).max
    exact = torch.randn(20_000, generator=generator) * torch.logspace(-12, math.log10(largest) - 1, 20_000)
    rounded = round_stochastically(exact, dtype, generator)
    numbers = _every_number(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    place = torch.searchsorted(numbers, exact.double())
    assert bool(
        ((rounded.double() == numbers[place]) | (rounded.double() == numbers[(place - 1).clamp_min(0)])).all()
    )


@pytest.mark.parametrize("dtype", HALF)
def test_what_lies_beyond_the_largest_number_is_rounded_to_nearest(dtype):
    largest = torch.finfo(dtype).max
    step = largest - _around(largest * (1 - 1e-6), dtype)[0]
    beyond = torch.tensor([largest + part * step for part in (0.1, 0.49, 0.51, 0.9)]).repeat(500)
    expected = torch.tensor([largest, largest, math.inf, math.inf]).repeat(500)
    exact = torch.cat([beyond, -beyond, torch.tensor([math.inf, -math.inf])])
    expected = torch.cat([expected, -expected, torch.tensor([math.inf, -math.inf])])
    rounded = round_stochastically(exact, dtype, torch.Generator().manual_seed(0))
    assert torch.equal(rounded.float(), expected)
    below = torch.full((2000,), largest - 0.01 * step)
    assert set(round_stochastically(below, dtype, torch.Generator().manual_seed(0)).tolist()) == {
        largest,
        largest - step,
    }


def test_nan_with_any_payload_stays_nan():
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -(1 << 23) + 1], dtype=torch.int32)
    exact = torch.cat([payloads.view(torch.float32), torch.tensor([1.0])]).repeat(100)
    for dtype in HALF:
        rounded = round_stochastically(exact, dtype, torch.Generator().manual_seed(0))
        assert torch.equal(rounded.isnan(), exact.isnan())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (2, 3, 4)])
def test_any_shape_also_one_that_is_not_contiguous(dtype, shape):
    exact = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).mT
        if len(shape) > 1
        else torch.randn(shape)
    )
    kept = exact.clone()
    rounded = round_stochastically(exact, dtype, torch.Generator().manual_seed(0))
    assert torch.equal(exact, kept)
    assert rounded.shape == exact.shape
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_dtypes_are_not_rounded_and_draw_nothing(dtype):
    exact, generator = torch.randn(9, dtype=torch.float64), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(round_stochastically(exact, dtype, generator), exact.to(dtype))
    assert torch.equal(generator.get_state(), before)


def test_all_sixteen_bits_are_random_and_no_two_elements_share_them():
    count = 1 << 16
    drawn = rounding._random_bits(count, torch.Generator().manual_seed(0)).int()
    bits = (
        torch.stack([(drawn >> place) & 1 for place in range(16)], 1).double().view(-1, 64)
    )  # four elements
    spread = 5 * 0.5 / math.sqrt(len(bits))
    assert float((bits.mean(0) - 0.5).abs().max()) < spread
    correlation = torch.corrcoef(bits.T) - torch.eye(64, dtype=torch.float64)
    assert float(correlation.abs().max()) < 6 / math.sqrt(len(bits))


def test_a_stream_is_a_function_of_its_key():
    draws = [torch.rand(100, generator=random_stream(key)) for key in ("a", "a", "b")]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
