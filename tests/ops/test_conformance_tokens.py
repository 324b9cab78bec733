"""Token statistics of every back end against the reference; run again like ``test_conformance.py``."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from lightning_rejuv.ops import reference
from tests.ops.backends import Backend, backends
from tests.ops.test_conformance import LAYOUTS, laid_out

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(params=backends(), ids=lambda backend: backend.name)
def backend(request) -> Backend:
    return request.param


def peaked(rows: int, vocabulary: int, dtype: torch.dtype, gap: float, level: float, device: str) -> Tensor:
    """Logits like an over-trained model's: one entry ``gap`` above the rest, all around ``level``."""
    x = 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) + level
    x[:, vocabulary // 2] = x.amax(1) + gap
    return x.to(device, dtype)


def statistics(backend: Backend, *parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return backend.functions.merge_token_partials(
        torch.stack([sums for sums, _ in parts]), torch.stack([ids for _, ids in parts])
    )


def assert_token_stats(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    (stats, ids), (expected_stats, expected_ids) = found, expected
    assert stats.dtype == torch.float64
    torch.testing.assert_close(stats[0], expected_stats[0], rtol=1e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(stats[1:3], expected_stats[1:3], rtol=1e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(stats[3], expected_stats[3], rtol=2e-6, atol=0.0, equal_nan=True)
    assert torch.equal(ids, expected_ids)


# Every pair of dtype, size and level once; the rest of the product is slow.
PRODUCT = list(product(range(3), repeat=3))


@pytest.mark.parametrize(
    ("dtype", "size", "gap", "level"),
    [
        pytest.param(
            [torch.float32, torch.bfloat16, torch.float16][i],
            [(5, 7), (4, 1031), (3, 4104)][j],
            *[(0, 0), (12, 30), (18, -120)][k],
            marks=[] if (i + j + k) % 3 == 0 else pytest.mark.slow,
        )
        for i, j, k in PRODUCT
    ],
)
def test_token_stats(backend, dtype, size, gap, level):
    logits = peaked(*size, dtype, gap, level, backend.device)
    target = torch.arange(size[0], device=backend.device) % size[1]
    found = statistics(backend, backend.functions.token_partials(logits, target, 1.0, None, 0))
    assert_token_stats(found, reference.token_stats(logits, target))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(40, 1), (3, 4104)])
def test_strides(backend, size, layout):
    logits = laid_out(peaked(*size, torch.bfloat16, 12, 30, backend.device), layout)
    target = torch.arange(size[0], device=backend.device) % size[1]
    found = statistics(backend, backend.functions.token_partials(logits, target, 1.0, None, 0))
    assert_token_stats(found, reference.token_stats(logits, target))


@pytest.mark.parametrize("vocabulary", [130, 4104])
def test_temperatures(backend, vocabulary):
    logits = peaked(6, vocabulary, torch.float32, 3, 10, backend.device)
    target = torch.arange(6, device=backend.device)
    tau = torch.tensor([0.3, 0.7, 1.0, 1.0, 2.0, 5.0], device=backend.device)
    for scale, per_row in ((0.7, None), (1.0, tau)):
        found = statistics(backend, backend.functions.token_partials(logits, target, scale, per_row, 0))
        assert_token_stats(
            found, reference.token_stats(logits, target, scale if per_row is None else per_row)
        )


def test_nonpositive_temperature_of_a_row_is_nan_in_that_row(backend):
    logits = peaked(4, 130, torch.float32, 0, 0, backend.device)
    tau = torch.tensor([1.0, 0.0, -1.0, float("nan")], device=backend.device)
    stats, ids = statistics(backend, backend.functions.token_partials(logits, ids_of(logits), 1.0, tau, 0))
    assert stats.isnan().all(0).tolist() == [False, True, True, True]
    assert ids[1:].tolist() == [-1, -1, -1]


def ids_of(logits: Tensor) -> Tensor:
    return logits.argmax(1)


@pytest.mark.parametrize("vocabulary", [130, 4104])
def test_rows_without_a_distribution(backend, vocabulary):
    logits = peaked(7, vocabulary, torch.float32, 0, 0, backend.device)
    logits[1, 5] = float("nan")
    logits[2] = -INF
    logits[3, 9] = INF
    logits[4] = torch.finfo(torch.float32).min  # uniform
    logits[5, :] = -INF
    logits[5, 7] = 1.0  # certain
    logits[6, vocabulary // 2 :] = -INF
    target = torch.tensor([0, 0, 0, 9, 3, 7, vocabulary - 1], device=backend.device)
    found = statistics(backend, backend.functions.token_partials(logits, target, 1.0, None, 0))
    assert_token_stats(found, reference.token_stats(logits, target))
    stats, ids = found
    assert stats.isnan().all(0).tolist() == [False, True, True, True, False, False, False]
    assert stats[0, 5].item() == 0.0
    assert stats[2, 6].item() == -INF
    assert ids[1:4].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("vocabulary", [130, 4104])
def test_equal_logits_take_the_lowest_index(backend, vocabulary):
    logits = torch.zeros(vocabulary, vocabulary, device=backend.device)[:5]
    logits[0, [3, 100, vocabulary - 1]] = 4.0
    logits[1, [vocabulary - 2, vocabulary - 1]] = 4.0
    logits[2, [64, 65]] = 4.0
    logits[3, [127, 129]] = 4.0
    _, ids = statistics(backend, backend.functions.token_partials(logits, None, 0.7, None, 0))
    assert ids.tolist() == [3, vocabulary - 2, 64, 127, 0]


def test_neighbouring_floats_are_not_equal(backend):
    """The scaled maximum of two neighbours can round to one value; the index is taken before scaling."""
    top = torch.tensor(30.0)
    logits = torch.zeros(1, 4104, device=backend.device)
    logits[0, 7], logits[0, 4000] = top, torch.nextafter(top, torch.tensor(INF))
    _, ids = statistics(backend, backend.functions.token_partials(logits, None, 0.7, None, 0))
    assert ids.item() == 4000


@pytest.mark.parametrize("target", [-100, -1, 130, 2**40])
def test_target_outside_the_vocabulary(backend, target):
    logits = peaked(2, 130, torch.float32, 0, 0, backend.device)
    targets = torch.tensor([target, 129], device=backend.device)
    stats, _ = statistics(backend, backend.functions.token_partials(logits, targets, 1.0, None, 0))
    assert stats[2].isnan().tolist() == [True, False]


@pytest.mark.parametrize("bounds", [(0, 40, 130), (0, 1, 2, 130), (*range(0, 130, 7), 130)])
def test_shards_of_the_vocabulary_merge(backend, bounds):
    logits = peaked(6, 130, torch.float32, 12, 30, backend.device)
    logits[0, :50] = -INF  # a shard that holds nothing
    logits[1, 3], logits[1, 90] = 99.0, 99.0
    target = torch.tensor([60, 0, 129, 41, 2, -100], device=backend.device)
    tau = torch.linspace(0.5, 2.0, 6, device=backend.device)
    pairs = [(a, b) for a, b in pairwise(bounds) if b > a]
    parts = [backend.functions.token_partials(logits[:, a:b], target, 1.0, tau, a) for a, b in pairs]
    expected = reference.token_stats(logits, target, tau)
    assert_token_stats(statistics(backend, *parts), expected)
    assert_token_stats(statistics(backend, *parts[::-1]), expected)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(backend, rows):
    logits = peaked(rows, 130, torch.float32, 0, 0, backend.device) if rows else torch.zeros(0, 130)
    logits = logits.to(backend.device)
    stats, ids = statistics(backend, backend.functions.token_partials(logits, None, 1.0, None, 0))
    assert stats.shape == (4, rows)
    assert ids.shape == (rows,)


# Residues modulo the 16-byte load of 1 to 8 elements, on both sides of a tile of 2048 (float32: 1024) and of two.
ODD_SIZES = [1, 7, 8, 9, 130, 2047, 2048, 2049, 2051, 4104, 5003]


def sliced(x: Tensor, cut: str) -> Tensor:
    """The same values in a frame of NaN: with rows that start, end, or follow each other elsewhere."""
    rows, columns = x.shape
    before, behind = {"whole": (0, 0), "from 1": (1, 0), "to -1": (0, 1), "padded": (3, 10)}[cut]
    frame = torch.full((rows, before + columns + behind), float("nan"), dtype=x.dtype, device=x.device)
    return frame[:, before : before + columns].copy_(x)


def edge_cases(vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Rows whose maximum, -inf, NaN or target lie at an end, among them ties; ten rows and their targets."""
    x = 3 * torch.randn(10, vocabulary, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    lowest = torch.finfo(dtype).min
    x[1] = -INF
    x[2, vocabulary // 2] = float("nan")
    x[3] = lowest
    x[4, :-1] = -INF
    x[5, 1:] = -INF
    x[6, [0, -1]] = 50.0
    x[7, [vocabulary // 3, -1]] = 50.0
    x[8] = -INF
    x[8, vocabulary // 2 :] = lowest
    target = torch.tensor([0, 0, 0, -1, vocabulary - 1, 0, -100, vocabulary, vocabulary // 2, vocabulary - 1])
    return x, target.to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cut", ["whole", "from 1", "to -1", "padded"])
@pytest.mark.parametrize(
    "vocabulary", [v if v in (7, 2051) else pytest.param(v, marks=pytest.mark.slow) for v in ODD_SIZES]
)
def test_rows_start_anywhere(backend, vocabulary, cut, dtype):
    logits, target = edge_cases(vocabulary, dtype, backend.device)
    found = statistics(backend, backend.functions.token_partials(sliced(logits, cut), target, 1.0, None, 0))
    assert_token_stats(found, reference.token_stats(logits, target))


def test_a_slice_of_a_vector_starts_anywhere(backend):
    """The start of the first row, not only the distance of the rows, decides which boundary lies below it."""
    frame = torch.full((11 * 5003,), float("nan"), device=backend.device)
    logits, target = edge_cases(2051, torch.float32, backend.device)
    for start in range(5):
        view = frame[start:].as_strided((10, 2051), (5003, 1)).copy_(logits)
        found = statistics(backend, backend.functions.token_partials(view, target, 1.0, None, 0))
        assert_token_stats(found, reference.token_stats(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cut", ["whole", "from 1"])
@pytest.mark.parametrize("vocabulary", [2048, 5003])
def test_rows_in_several_parts(backend, vocabulary, cut, dtype, monkeypatch):
    """Parts of one step each, of which the last may be empty in the rows that start on a boundary."""
    if backend.name == "blocked":
        pytest.skip("the blocked back end does not split a row")
    from lightning_rejuv.ops import triton_tokens

    def in_steps(rows: int, length: int, step: int, multiprocessors: int) -> tuple[int, int]:
        return -(-length // step), step

    monkeypatch.setattr(triton_tokens, "split_vocabulary", in_steps)
    logits, target = edge_cases(vocabulary, dtype, backend.device)
    found = statistics(backend, backend.functions.token_partials(sliced(logits, cut), target, 1.0, None, 0))
    assert_token_stats(found, reference.token_stats(logits, target))


@pytest.mark.parametrize("values", [[-INF, LOWEST, -INF], [LOWEST] * 3, [-2e38, -2e38, -INF]])
def test_rows_whose_scaled_maximum_lies_below_the_lowest_float(backend, values):
    """Masked as a whole, at a temperature below 1: the maximum is beyond float32, and still one."""
    x = torch.tensor([values], dtype=torch.float32, device=backend.device)
    sums, ids = backend.functions.token_partials(x, None, 0.5, None, 0)
    found, first = backend.functions.merge_token_partials(sums[None], ids[None])
    largest = max(values)
    count = values.count(largest)
    assert first.tolist() == [values.index(largest)]
    assert found[0].item() == pytest.approx(math.log(count), abs=1e-6)
    assert found[3].item() == pytest.approx(1 / count)
    assert found[1].item() == pytest.approx(2.0 * torch.tensor(largest).item(), rel=1e-6)
