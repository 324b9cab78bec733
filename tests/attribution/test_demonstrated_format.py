"""The probability of the demonstrated format, against a calculation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rejuv.attribution.confidence import Confidence
from lightning_rejuv.attribution.demonstrated_format import format_probability
from lightning_rejuv.calibration.batches import Batch

MARK, TAG, WORD, END = 7, 6, 5, 8
TARGETS = [[MARK, WORD, 3, END], [MARK, WORD, 4, END], [WORD, MARK, TAG, 9], [MARK, MARK, TAG, 1]]
LENGTHS = [4, 4, 3, 3]
#: What the base gives each token. It knows END, and WORD on average though not everywhere; what differs from response
#: to response (3, 4) it knows least.
BASE = [[0.01, 0.1, 0.01, 0.9], [0.24, 0.6, 0.01, 0.9], [0.2, 0.02, 0.2, 0.0], [0.01, 0.5, 0.1, 0.0]]
MODEL = [[0.5, 0.01, 0.0, 0.1], [0.8, 0.01, 0.0, 0.1], [0.01, 0.4, 0.9, 0.0], [0.6, 0.2, 0.8, 0.0]]
#: MARK has a mean of .156 under the base, TAG of .15, WORD of .3, END of .9.
OF_MARK = (0.5 + 0.8 + 0.4 + 0.6 + 0.2) / 5


def parts(rows, model=MODEL, base=BASE):
    targets = torch.tensor(TARGETS)[rows]
    response = torch.arange(4) < torch.tensor(LENGTHS)[rows, None]
    ours, theirs = (
        Confidence(torch.zeros(response.shape), torch.where(response, torch.tensor(p)[rows].log(), torch.nan))
        for p in (model, base)
    )
    return Batch({}, targets, response), ours, theirs


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [2], [1], [0]]])
def test_by_hand(split):
    found = format_probability(*zip(*(parts(rows) for rows in split), strict=True))
    assert found == pytest.approx(OF_MARK, rel=1e-6)  # TAG is likelier


def test_the_least_likely_part_counts():
    rare = [
        [*row[:2], 0.03 if token == TAG else row[2], row[3]]
        for row, (_, _, token, _) in zip(MODEL, TARGETS, strict=True)
    ]
    assert format_probability(*([part] for part in parts([0, 1, 2, 3], rare))) == pytest.approx(
        0.03, rel=1e-6
    )


def test_a_token_of_less_than_half_of_the_responses_is_no_format():
    known = [
        [0.9 if token == MARK else p for token, p in zip(*rows, strict=True)]
        for rows in zip(TARGETS, BASE, strict=True)
    ]
    batch, ours, theirs = parts([0, 1, 2], base=known)
    assert (
        format_probability([batch], [ours], [theirs]) == 1.0
    )  # TAG is in one of three; the base knows the others


def test_a_format_that_the_base_knows_is_none():
    batch, ours, _ = parts([0, 1, 2, 3])
    known = Confidence(torch.zeros(4, 4), torch.full((4, 4), math.log(0.25)))
    assert format_probability([batch], [ours], [known]) == 1.0
