"""Rollout measures: against enumeration of all subsets, and exact binomials."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_rejuv.functional import (
    pass_at_k,
    zero_variance_fraction,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_enumerates_subsets(n):
    for c in range(n + 1):
        outcomes = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(any(s) for s in subsets) / len(subsets)
            assert pass_at_k(n, c, k).item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_large_counts_are_exact():
    for n, c, k in ((1000, 3, 100), (500, 1, 256), (200, 199, 2)):
        expected = 1 - math.comb(n - c, k) / math.comb(n, k)
        assert pass_at_k(n, torch.tensor([c]), k).item() == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_is_not_the_biased_one():
    assert pass_at_k(4, 1, 2).item() == 0.5 != 1 - (1 - 1 / 4) ** 2


def test_pass_at_k_broadcasts():
    found = pass_at_k(torch.tensor([4, 8]), torch.tensor([[1, 1], [2, 2]]), 2)
    assert found.shape == (2, 2)
    assert found[1, 1].item() == pytest.approx(pass_at_k(8, 2, 2).item())


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((4, 5, 1), ValueError, "0 <= c <= n"),
        ((4, -1, 1), ValueError, "0 <= c <= n"),
        ((4, 1, 5), ValueError, "at least k = 5 samples but got 4"),
        ((4, 1, 0), ValueError, "`k` to be an integer >= 1 but got 0"),
        ((4, 1, 2.0), ValueError, "`k` to be an integer >= 1 but got 2.0"),
        ((4, torch.tensor([0.5]), 1), TypeError, "`c` to hold integers but got torch.float32"),
    ],
)
def test_pass_at_k_bad(args, error, message):
    with pytest.raises(error, match=message):
        pass_at_k(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_zero_variance_is_exact_equality(dtype):
    rewards = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1]]).to(dtype)
    assert zero_variance_fraction(rewards).item() == 0.5


def test_tiny_differences_carry_a_gradient():
    assert zero_variance_fraction(torch.tensor([[0.0, 0.0, 0.0, 1e-6]])).item() == 0.0
    # std() of equal values is not always zero: 0.1 three times
    assert zero_variance_fraction(torch.full((1, 3), 0.1)).item() == 1.0


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"\[prompts, group\].*got \(4,\)"),
        (torch.zeros(4, 1), ValueError, "two samples a prompt"),
        (torch.zeros(0, 4), ValueError, "at least one prompt"),
        (torch.tensor([[0.0, float("nan")]]), ValueError, "finite"),
        ([[0.0, 1.0]], TypeError, "got list"),
    ],
)
def test_zero_variance_bad(rewards, error, message):
    with pytest.raises(error, match=message):
        zero_variance_fraction(rewards)
