"""Ranks: against singular values by numpy, and against what is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_rejuv.functional import effective_rank, srank, stable_rank


def sigma(features: torch.Tensor, center: bool) -> np.ndarray:
    x = features.double().numpy()
    return np.linalg.svd(x - x.mean(0) if center else x, compute_uv=False)


def by_numpy(name: str, s: np.ndarray, delta: float = 0.01) -> float:
    p = s / s.sum()
    if name == "effective_rank":
        return float(np.exp(-sum(v * math.log(v) for v in p if v > 1e-14)))
    if name == "stable_rank":
        return float((s**2).sum() / s.max() ** 2)
    return float(next(k for k in range(1, len(s) + 1) if s[:k].sum() >= (1 - delta) * s.sum()))


RANKS = {f.__name__: f for f in (effective_rank, stable_rank, srank)}


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "low_rank", "shifted", "sinks", "bfloat16"])
def test_matches_singular_values(name, center, kind):
    torch.manual_seed(0)
    features = torch.randn(300, 24)
    if kind == "low_rank":
        features = torch.randn(300, 3) @ torch.randn(3, 24)
    if kind == "shifted":
        features = features + 100
    if kind == "sinks":
        features[:8] *= 1000
    if kind == "bfloat16":
        features = features.bfloat16()
    expected = by_numpy(name, sigma(features, center))
    assert RANKS[name](features, center=center).item() == pytest.approx(expected, rel=2e-4)


def test_names_are_kept_apart():
    # One 512 x 96 matrix: three quantities that libraries call by two names.
    values = torch.cat([torch.full((4,), 10.0), torch.full((92,), 0.5)])
    features = torch.linalg.qr(torch.randn(512, 96, generator=torch.Generator().manual_seed(1)))[0] * values
    assert stable_rank(features).item() == pytest.approx((4 * 100 + 92 * 0.25) / 100, rel=1e-5)
    assert srank(features).item() == 95
    assert effective_rank(features).item() == pytest.approx(
        by_numpy("effective_rank", values.numpy()), rel=1e-4
    )


@pytest.mark.parametrize("name", RANKS)
def test_zero_features_have_rank_zero(name):
    assert RANKS[name](torch.zeros(8, 3)).item() == 0.0


@pytest.mark.parametrize("name", RANKS)
def test_rank_one_is_one(name):
    features = torch.randn(64, 1) @ torch.randn(1, 16)
    assert RANKS[name](features).item() == pytest.approx(1.0, abs=1e-5)


def test_sinks_are_left_out_by_the_mask():
    torch.manual_seed(0)
    features = torch.randn(4, 128, 16)
    clean = effective_rank(features[:, 1:])
    features[:, 0] *= 1000
    features[0, 5] = math.nan
    mask = torch.ones(4, 128, dtype=torch.bool)
    mask[:, 0] = mask[0, 5] = False
    assert effective_rank(features, mask=mask).item() == pytest.approx(clean.item(), rel=2e-3)
    features[0, 5] = 0
    assert effective_rank(features).item() < 0.5 * clean.item()  # the trap is real


def test_too_few_rows_are_reported():
    features = torch.randn(10, 64)
    with pytest.warns(UserWarning, match="10 rows of 64 features: no rank above 10"):
        value = effective_rank(features)
    assert value <= 10
    with pytest.raises(ValueError, match="no rank above 9"):
        effective_rank(features, center=True, strict=True)


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize(
    ("features", "kwargs", "error", "message"),
    [
        (torch.randn(5), {}, ValueError, r"\[\.\.\., d\] with rows but got \(5,\)"),
        (torch.ones(5, 2, dtype=torch.int32), {}, TypeError, "floating dtype but got torch.int32"),
        (torch.full((5, 2), math.nan), {}, ValueError, "finite but got NaN or inf"),
        (torch.randn(5, 2), {"mask": torch.zeros(5, dtype=torch.bool)}, ValueError, "selects none"),
        (torch.randn(5, 2), {"mask": torch.zeros(2, dtype=torch.bool)}, ValueError, r"\(5,\).*got \(2,\)"),
    ],
)
def test_bad_input(name, features, kwargs, error, message):
    with pytest.raises(error, match=message):
        RANKS[name](features, **kwargs)


def test_srank_delta():
    features = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert [srank(features, delta=d).item() for d in (0.0, 0.1, 0.35, 1.0)] == [4, 3, 2, 1]
    with pytest.raises(ValueError, match="`delta`"):
        srank(features, delta=2.0)
