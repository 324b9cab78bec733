"""Support retention, against hand-made sums."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rejuv.functional import support_retention


def test_support_retention_sums_over_a_response_and_averages_over_responses():
    logp = torch.tensor([[-1.0, -2.0, -50.0], [-3.0, -50.0, -50.0]])
    base = torch.tensor([[-0.5, -0.5, math.nan], [-1.0, math.nan, -1.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert support_retention(logp, base, mask).item() == pytest.approx(((-0.5 - 1.5) + (-2.0)) / 2)
    longer = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)])
    pad = torch.zeros(1, 3)
    assert support_retention(torch.cat([logp, pad]), torch.cat([base, pad]), longer).item() == pytest.approx(
        -2.0
    )


def test_support_retention_bad():
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="same shape"):
        support_retention(a, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="selects none"):
        support_retention(a, a, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        support_retention(a, torch.full((2, 3), math.nan))
