"""The rows of a report on a search for alpha, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_rejuv.alpha.search import AlphaPoint, AlphaSearch
from lightning_rejuv.report.rows import search_rows

CURVE = [
    AlphaPoint(0.0, 61.25, 5.5, 0.001),
    AlphaPoint(0.5, 12.0, 7.0, 0.5),
    AlphaPoint(1.0, 8.125, 1234.5678, 1.0),
]
SURE = AlphaSearch("auto", 0.43, 0.5, 0.8049, 0.7551, CURVE, responses=64, unfinished=0)


def test_a_search_without_doubts():
    assert dict(search_rows(SURE)) == {
        "  found by": "auto: 80% of what SFT taught and 76% of the base's support are kept; the bargain of both is at "
        "0.50",
        "  alpha tried": "     0    0.5      1",
        "  demonstrations": " 61.25     12  8.125",
        "  base samples": "   5.5      7   1235",
        "": "negative log-likelihoods, nats a response; 64 base samples",
    }


@pytest.mark.parametrize("curve", [True, False])
def test_doubts_and_rollouts_are_told_with_and_without_the_curve(curve):
    doubts = ("No alpha keeps both.", "7 of the base's 64 samples did not end.")
    found = list(search_rows(replace(SURE, unfinished=7, right=0.25, judged=48, doubts=doubts), curve))
    assert found[-3:] == [
        ("  rollouts", "25% of 48 at this alpha are right"),
        ("  doubt", doubts[0]),
        ("  doubt", doubts[1]),
    ]
    titles = [title for title, _ in found[:-3]]
    assert titles == (
        ["  found by", "  alpha tried", "  demonstrations", "  base samples", ""] if curve else ["  found by"]
    )
    if curve:
        assert found[-4][1].endswith("; 64 base samples, 7 of them unfinished")
