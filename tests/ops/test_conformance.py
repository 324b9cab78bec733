"""Every back end against the float64 reference; ``test_triton_interpreter.py`` runs this file again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_rejuv.ops import reference
from tests.ops.backends import Backend, backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(19, 70), (70, 130)]
LAYOUTS = ["sliced", "transposed"]
SUM_TOLERANCE = 1e-6


@pytest.fixture(params=backends(), ids=lambda backend: backend.name)
def backend(request) -> Backend:
    return request.param


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values behind other strides; what lies between them must not be read."""
    if layout == "sliced":
        frame = torch.full((2 * x.shape[0], 2 * x.shape[1] + 3), float("nan"), dtype=x.dtype, device=x.device)
        view = frame[::2, 1 : x.shape[1] + 1]
        return view.copy_(x)
    return x.t().contiguous().t() if layout == "transposed" else x


def activations(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(rows, columns, generator=generator)
    x[torch.rand(rows, columns, generator=generator) < 0.2] = 0.0
    return x.to(device, dtype)


def keep(rows: int, device: str) -> Tensor:
    return (torch.rand(rows, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)


def assert_sums(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Float32 sums: equal up to rounding of the terms, whose absolute sum is ``scale``."""
    assert found.dtype == torch.float64
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[~finite], expected[~finite], equal_nan=True)
    assert bool(
        (found - expected).abs()[finite].le(SUM_TOLERANCE * scale.expand_as(found)[finite] + 1e-30).all()
    )


def assert_activation_stats(found: Tensor, expected: Tensor) -> None:
    scale = expected.clone()
    scale[1] = expected[0]
    scale[3:] = 0.0
    assert_sums(found, expected, scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 1), *SIZES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_stats(backend, dtype, size, masked):
    h = activations(*size, dtype, backend.device)
    mask = keep(size[0], backend.device) if masked else None
    found = torch.zeros(7, size[1], dtype=torch.float64, device=backend.device)
    backend.functions.activation_stats_(found, h, mask, 0.1)
    assert_activation_stats(found, reference.activation_stats(h, mask, 0.1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_activation_stats_strides(backend, size, layout):
    h, mask = (
        laid_out(activations(*size, torch.bfloat16, backend.device), layout),
        keep(size[0], backend.device),
    )
    found = torch.zeros(7, size[1], dtype=torch.float64, device=backend.device)
    backend.functions.activation_stats_(found, h, mask, 0.1)
    assert_activation_stats(found, reference.activation_stats(h, mask, 0.1))


def test_activation_stats_accumulates(backend):
    first, second = (activations(n, 70, torch.bfloat16, backend.device, seed=n) for n in (20, 33))
    found = torch.zeros(7, 70, dtype=torch.float64, device=backend.device)
    for h in (first, second):
        backend.functions.activation_stats_(found, h, None, 0.1)
    assert_activation_stats(found, reference.activation_stats(torch.cat([first, second]), None, 0.1))


def test_activation_stats_threshold_is_inclusive_in_float32(backend):
    threshold = 0.1  # as float32 it is larger than as float64
    h = torch.tensor([[0.1], [-0.1], [0.2]], device=backend.device)
    found = torch.zeros(7, 1, dtype=torch.float64, device=backend.device)
    backend.functions.activation_stats_(found, h, None, threshold)
    assert found[4].item() == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activation_stats_nonfinite_stay_in_their_neuron(backend, value):
    h = activations(130, 70, torch.float32, backend.device)
    h[5, 7] = value
    mask = torch.ones(130, dtype=torch.bool, device=backend.device)
    found = torch.zeros(7, 70, dtype=torch.float64, device=backend.device)
    # The second call must not wash it out.
    backend.functions.activation_stats_(found, h, mask, 0.1)
    backend.functions.activation_stats_(found, h[20:30], None, 0.1)
    assert_activation_stats(found, reference.activation_stats(torch.cat([h, h[20:30]]), None, 0.1))
    mask[5] = False
    found.zero_()
    backend.functions.activation_stats_(found, h, mask, 0.1)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("rows", [0, 40])
def test_activation_stats_of_no_token_change_nothing(backend, rows):
    h = activations(rows, 70, torch.float32, backend.device)
    mask = torch.zeros(rows, dtype=torch.bool, device=backend.device)
    found = torch.full((7, 70), 2.0, dtype=torch.float64, device=backend.device)
    backend.functions.activation_stats_(found, h, mask, 0.1)
    assert torch.equal(found, torch.full_like(found, 2.0))


def test_activation_stats_float32_accumulator(backend):
    h = activations(33, 70, torch.bfloat16, backend.device)
    found = torch.zeros(7, 70, device=backend.device)
    backend.functions.activation_stats_(found, h, None, 0.1)
    assert_activation_stats(found.double(), reference.activation_stats(h, None, 0.1))


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_grad_activation_stats(backend, dtypes, masked, layout):
    size = (70, 130)
    h = laid_out(activations(*size, dtypes[0], backend.device), layout)
    g = activations(*size, dtypes[1], backend.device, seed=1)
    mask = keep(size[0], backend.device) if masked else None
    found = torch.ones(4, size[1], dtype=torch.float64, device=backend.device)
    backend.functions.grad_activation_stats_(found, h, g, mask)
    expected = reference.grad_activation_stats(h, g, mask)
    assert_sums(found, expected + 1, expected[[0, 1, 0, 3]] + 1)


def test_grad_activation_stats_leave_masked_nan_unread(backend):
    h = activations(33, 70, torch.float32, backend.device)
    g, mask = h.clone(), torch.ones(33, dtype=torch.bool, device=backend.device)
    g[3, 5], mask[3] = float("nan"), False
    found = torch.zeros(4, 70, dtype=torch.float64, device=backend.device)
    backend.functions.grad_activation_stats_(found, h, g, mask)
    assert bool(found.isfinite().all())
    backend.functions.grad_activation_stats_(found, h, g, None)
    assert found[:3].isnan().nonzero().tolist() == [[0, 5], [1, 5], [2, 5]]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("size", [(1, 1), (20, 70), (40, 300)])
def test_weight_drift(backend, size, dtypes):
    base = activations(*size, dtypes[1], backend.device)
    change = 3e-3 * torch.randn(size, generator=torch.Generator().manual_seed(2)).to(backend.device)
    weight = (base.float() + change).to(dtypes[0])
    for found, expected in zip(
        backend.functions.weight_drift(weight, base), reference.weight_drift(weight, base), strict=True
    ):
        assert_sums(found, expected, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_drift_strides(backend, layout):
    base = activations(20, 70, torch.bfloat16, backend.device)
    weight = laid_out(base + 0.5, layout)
    for pair in ((weight, base), (base, weight)):
        for found, expected in zip(
            backend.functions.weight_drift(*pair), reference.weight_drift(*pair), strict=True
        ):
            assert_sums(found, expected, expected)


def test_weight_drift_nonfinite_stay_in_their_row_and_column(backend):
    base = activations(70, 130, torch.float32, backend.device)
    weight = base + 1.0
    weight[3, 4], weight[60, 100] = float("nan"), float("inf")
    for found, expected in zip(
        backend.functions.weight_drift(weight, base), reference.weight_drift(weight, base), strict=True
    ):
        assert_sums(found, expected, expected)
        assert (~found.isfinite()).sum() == 6  # drift, weight and maximum of two rows (columns)


def test_repeats_are_bitwise_equal(backend):
    h, g = (activations(70, 130, torch.bfloat16, backend.device, seed) for seed in (0, 1))

    def run() -> list[Tensor]:
        a, b = (torch.zeros(n, 130, dtype=torch.float64, device=backend.device) for n in (7, 4))
        backend.functions.activation_stats_(a, h, None, 0.1)
        backend.functions.grad_activation_stats_(b, h, g, None)
        return [
            a,
            b,
            *backend.functions.weight_drift(h, g),
            *backend.functions.token_partials(h[:9], None, 0.7, None, 0),
        ]

    for first, second in zip(run(), run(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strides", [(2**30 + 64, 1), (1, 2**31 // 60)], ids=["rows", "columns"])
def test_offsets_beyond_two_to_the_31(backend, strides):
    # Each stride fits 32 bits, its multiples do not.
    size = (3, 70)
    length = 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    assert length > 2**31
    # Five GiB of address space of which only the pages written are ever real.
    view = torch.empty(length, dtype=torch.bfloat16, device=backend.device).as_strided(size, strides)
    view.copy_(activations(*size, torch.bfloat16, backend.device))
    a, b = (torch.zeros(n, 70, dtype=torch.float64, device=backend.device) for n in (7, 4))
    backend.functions.activation_stats_(a, view, None, 0.1)
    assert_activation_stats(a, reference.activation_stats(view, None, 0.1))
    backend.functions.grad_activation_stats_(b, view, view, None)
    expected = reference.grad_activation_stats(view, view)
    assert_sums(b, expected, expected)
    rows, columns = backend.functions.weight_drift(view, torch.zeros(size, device=backend.device))
    assert_sums(rows, *[reference.weight_drift(view, torch.zeros(size, device=backend.device))[0]] * 2)
    assert_sums(columns, *[reference.weight_drift(view, torch.zeros(size, device=backend.device))[1]] * 2)
    target = torch.tensor([69, 1, 0], device=backend.device)
    stats, ids = backend.functions.merge_token_partials(
        *(x.unsqueeze(0) for x in backend.functions.token_partials(view, target, 1.0, None, 0))
    )
    torch.testing.assert_close(stats, reference.token_stats(view, target)[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(ids, reference.token_stats(view)[1])
