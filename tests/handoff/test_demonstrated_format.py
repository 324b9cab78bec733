"""The probability of the demonstrated format, against a calculation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rejuv.attribution.confidence import Confidence
from lightning_rejuv.calibration import Batch
from lightning_rejuv.handoff.demonstrated_format import format_probability

MARK, END = 7, 8
TARGETS = [[MARK, 3, END], [MARK, 4, END], [5, MARK, 6], [MARK, MARK, 9]]
LENGTHS = [3, 3, 3, 2]
#: What the base gives each token: it knows END, and nothing that differs from response to response.
BASE = [[0.01, 0.1, 0.9], [0.24, 0.1, 0.9], [0.1, 0.02, 0.2], [0.01, 0.25, 0.0]]
MODEL = [[0.5, 0.3, 0.9], [0.8, 0.2, 0.9], [0.7, 0.4, 0.1], [0.6, 0.9, 0.0]]
#: MARK where the base gave it less than a quarter.
FORMAT = [0.5, 0.8, 0.4, 0.6]


def parts(rows):
    targets = torch.tensor(TARGETS)[rows]
    response = torch.arange(3) < torch.tensor(LENGTHS)[rows, None]
    ours, theirs = (
        Confidence(torch.zeros(response.shape), torch.where(response, torch.tensor(p)[rows].log(), torch.nan))
        for p in (MODEL, BASE)
    )
    return Batch({}, targets, response), ours, theirs


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [2], [1], [0]]])
def test_by_hand(split):
    found = format_probability(*zip(*(parts(rows) for rows in split), strict=True))
    assert found == pytest.approx(sum(FORMAT) / 4, rel=1e-6)


def test_a_token_of_less_than_half_of_the_responses_is_no_format():
    batch, ours, theirs = parts([0, 1, 2, 3])
    few = theirs.log_prob.clone()
    few[[0, 1, 3], [0, 0, 0]] = math.log(0.9)  # MARK is new in one response of four
    assert format_probability([batch], [ours], [Confidence(theirs.entropy, few)]) == 1.0


def test_without_a_new_token_the_base_knows_the_format():
    batch, ours, _ = parts([0, 1])
    known = Confidence(torch.zeros(2, 3), torch.full((2, 3), 0.5).log())
    assert format_probability([batch], [ours], [known]) == 1.0
