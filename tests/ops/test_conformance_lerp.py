"""The kernels that edit weights and measure drift, against float64; run by ``test_triton_interpreter.py``."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.backends import backends

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 7, 8, 1024, 1025, 3001]
DEVICES = [backend.device for backend in backends() if backend.name != "blocked"]
KEY = 1 << 62 | 0x1234_5678_9ABC
WORDS = np.uint64(32)


@pytest.fixture(params=DEVICES or [pytest.param("", marks=pytest.mark.skip("no kernels in this process"))])
def device(request) -> str:
    return request.param


def pair(count: int, dtype: torch.dtype, base_dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    param, base = (torch.randn(count, generator=generator) for _ in range(2))
    return param.to(device, dtype), base.to(device, base_dtype)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox 4x32-10 of Salmon et al. 2011, in 64-bit integers."""
    c = [np.asarray(x, dtype=np.uint64) for x in counter]
    k = [np.uint64(x) for x in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> WORDS) ^ c[1] ^ k[0], b & low, (a >> WORDS) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def random_bits(count: int, key: int) -> np.ndarray:
    """The 16 bits of each element: low and high half of the four words of its group of eight."""
    groups = np.arange(math.ceil(count / 8), dtype=np.uint64)
    zero = np.zeros_like(groups)
    with np.errstate(over="ignore"):
        words = philox((groups, zero, zero, zero), (key & 0xFFFFFFFF, key >> 32))
    halves = [half for word in words for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    return np.stack(halves, 1).reshape(-1)[:count].astype(np.int64)


def test_the_reference_generator_gives_the_published_answers():
    """Known answers of the authors' Random123 for Philox 4x32-10."""
    ones = 0xFFFFFFFF
    for counter, key, expected in [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ]:
        found = philox(tuple(np.array([c]) for c in counter), key)
        assert tuple(int(word[0]) for word in found) == expected


@pytest.mark.parametrize("weight", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(("dtype", "base_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_to_nearest_is_the_float64_lerp_rounded_once(device, dtype, base_dtype, weight):
    from lightning_rejuv.ops import triton_lerp

    for count in SIZES:
        param, base = pair(count, dtype, base_dtype, device)
        exact = torch.lerp(param.double(), base.double(), weight)
        before, kept = param.clone(), base.clone()
        sums = triton_lerp.lerp_(param, base, weight, None).double().sum(1)
        assert torch.equal(base, kept)
        step = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert bool(((param.double() - exact).abs() <= 0.5001 * step + 1e-6).all())
        if dtype != torch.float32:
            line = base.double() - before.double()
            gap = (line * (exact - param.double())).sum()
            assert abs(float(sums[0] - gap)) < 1e-6 * count
            assert float(sums[1]) == pytest.approx(float(line.square().sum()), rel=1e-6)
        else:
            assert sums.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [9, 3001])
def test_stochastic_rounding_adds_the_bits_of_the_published_generator(device, dtype, count):
    """Numbers whose lerp is exact in float32, so that nothing but the random bits decides."""
    from lightning_rejuv.ops import triton_lerp

    generator = torch.Generator().manual_seed(0)
    largest = 128 if dtype == torch.bfloat16 else 1024
    param = torch.randint(1 - largest, largest, (count,), generator=generator)
    base = param + torch.randint(-1, 2, (count,), generator=generator)
    exact = (0.75 * param.double() + 0.25 * base.double()).float().numpy()
    dropped = 16 if dtype == torch.bfloat16 else 13
    low = (1 << dropped) - 1
    bits = exact.view(np.int32).astype(np.int64) + (random_bits(count, KEY) & low)
    expected = torch.from_numpy((bits & ~low).astype(np.int32).view(np.float32).copy())
    rounded = param.to(device, dtype)
    triton_lerp.lerp_(rounded, base.to(device, torch.float32), 0.25, KEY)
    # A sum that vanishes is a subnormal number, of which float16 cuts off fewer bits.
    normal = torch.from_numpy(np.abs(exact) >= 2.0**-14)
    assert torch.equal(rounded.cpu().float()[normal], expected[normal])
    assert int((expected != torch.from_numpy(exact).to(dtype).float()).sum()) > count // 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_goes_to_a_neighbour_and_keeps_the_mean(device, dtype):
    from lightning_rejuv.ops import triton_lerp

    count = 1 << 14
    smallest = torch.finfo(dtype).smallest_normal
    # Triton's interpreter does not convert subnormal bfloat16.
    subnormal = (
        () if dtype == torch.bfloat16 and device == "cpu" else (5 * smallest * torch.finfo(dtype).eps,)
    )
    for value in (1.0, -3.0, smallest, *subnormal):
        param = torch.full((count,), value, device=device).to(dtype)
        upper = torch.nextafter(param, torch.full_like(param, math.copysign(math.inf, value)))
        rounded = param.clone()
        sums = triton_lerp.lerp_(rounded, upper, 0.25, KEY).double().sum(1)
        assert bool(((rounded == param) | (rounded == upper)).all())
        share = float((rounded == upper).double().mean())
        assert abs(share - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5, value
        line = float((upper.double() - param.double())[0]) ** 2
        if line > 1e-30:  # squares of smaller ones vanish in float32
            assert float(sums[0]) == pytest.approx(
                count * line * (0.25 - share), rel=1e-3, abs=1e-6 * count * line
            )


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_special_values_and_what_did_not_differ_stay(device, dtype, key):
    from lightning_rejuv.ops import triton_lerp

    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, largest, -largest, torch.finfo(dtype).smallest_normal, 1.0, -1.5, math.nan]
    param = torch.tensor(values * 3, dtype=dtype, device=device)
    found = param.clone()
    triton_lerp.lerp_(found, param, 0.3, key)
    assert torch.equal(found.view(torch.int16)[:7], param.view(torch.int16)[:7])
    assert bool(found[7::8].isnan().all())
    wide = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype, device=device)
    found = triton_lerp.lerp_(
        torch.zeros(3, dtype=dtype, device=device).copy_(wide), wide.float() * 0, 0.3, key
    )
    assert not bool(found.isfinite().all())


@pytest.mark.parametrize(("dtype", "base_dtype"), [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
def test_what_a_key_gives_depends_on_nothing_but_the_element(device, dtype, base_dtype, monkeypatch):
    from lightning_rejuv.ops import triton_lerp

    param, base = pair(3001, dtype, base_dtype, device)
    first, again, other, split = (param.clone() for _ in range(4))
    triton_lerp.lerp_(first, base, 0.3, KEY)
    triton_lerp.lerp_(again, base, 0.3, KEY)
    triton_lerp.lerp_(other, base, 0.3, KEY + 1)
    monkeypatch.setattr(triton_lerp, "spread", lambda count, tile, device: (1, -(-count // tile)))
    triton_lerp.lerp_(split, base, 0.3, KEY)
    assert torch.equal(first, again)
    assert torch.equal(first, split)
    assert torch.equal(first, other) == (dtype == torch.float32)


@pytest.mark.parametrize(("dtype", "base_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_drift_sums_are_those_of_float64(device, dtype, base_dtype):
    from lightning_rejuv.ops import triton_drift_sums

    for count in SIZES:
        param, base = pair(count, dtype, base_dtype, device)
        base[::3] = param[::3].to(base_dtype)
        tolerance = 0.1
        found = triton_drift_sums.drift_sums(param, base, tolerance)
        line = param.double() - base.double()
        assert found.dtype == torch.float64
        assert float(found[0]) == pytest.approx(float(line.square().sum()), rel=1e-6)
        assert float(found[1]) == pytest.approx(float(base.double().square().sum()), rel=1e-6)
        assert int(found[2]) == int(((param.float() - base.float()).abs() <= tolerance).sum())
    same = triton_drift_sums.drift_sums(param, param, 0.0)
    assert (float(same[0]), int(same[2])) == (0.0, count)
    param[5] = math.nan
    assert triton_drift_sums.drift_sums(param, base, 0.0).isnan().tolist() == [True, False, False]
    assert triton_drift_sums.drift_sums(base.to(dtype), param, 0.0).isnan().tolist() == [True, True, False]
