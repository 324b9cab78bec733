"""What a diagnosis recommends: never against its own search, never without data, never twice."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from lightning_rejuv.alpha import AlphaSearch
from lightning_rejuv.handoff.behaviour import Behaviour, _Lengths
from lightning_rejuv.handoff.diagnosis import Diagnosis, recommend, verdict_on
from lightning_rejuv.handoff.record import Record
from lightning_rejuv.handoff.statistics import TensorStatistics
from lightning_rejuv.verdict import judge

RETENTIONS = {"plastic": -1.0, "at risk": -5.0, "collapsed": -9.0}


def behaviour(retention=-1.0, alpha=0.5, tokens=10.0, entropy=(0.2, 1.0)):
    search = AlphaSearch("auto", alpha, 1.0, [(1.0, -retention)])
    return Behaviour(3, *entropy, retention, False, tokens, search)


def test_the_verdict_is_that_of_the_monitor():
    for tokens, retention, entropy in itertools.product((10.0, 100.0), (-1.0, -5.0, -9.0), (0.05, 0.3, 1.0)):
        found = verdict_on(behaviour(retention, tokens=tokens, entropy=(entropy, 1.0)), unchanged=False)
        values = {"support_retention": retention, "token_entropy": entropy}
        assert found == judge(values, {"token_entropy": 1.0}, tokens)
        assert [reason.measure for reason in found.reasons] == ["support_retention", "token_entropy"]
    assert verdict_on(None, unchanged=False).level == "unknown"
    assert verdict_on(None, unchanged=True).level == "plastic"


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.997, 1.0])
@pytest.mark.parametrize("level", RETENTIONS)
def test_what_is_recommended_is_what_the_search_found(level, alpha):
    measured = behaviour(RETENTIONS[level], alpha)
    verdict = verdict_on(measured, unchanged=False)
    assert verdict.level == level
    text, recommended = recommend(verdict, measured, None, unchanged=False)
    if level == "plastic":
        assert "nothing to do" in text
        assert recommended in (None, measured.search.alpha)
    elif alpha == 1.0:
        assert "nothing to fuse" in text
        assert recommended == 1.0
    else:
        assert recommended == alpha
        assert f"alpha {alpha:.3f}" in text


def test_without_calibration_data_nothing_is_recommended():
    for unchanged in (False, True):
        text, alpha = recommend(verdict_on(None, unchanged), None, None, unchanged)
        assert alpha is None
        assert ("nothing to rejuvenate" if unchanged else "--calibration") in text


@pytest.mark.parametrize("level", ["unknown", *RETENTIONS])
def test_a_second_rejuvenation_is_never_recommended(level):
    measured = behaviour(RETENTIONS[level], 0.3) if level in RETENTIONS else None
    record = Record(0.4, 3, "sft", "base")
    text, alpha = recommend(verdict_on(measured, unchanged=False), measured, record, unchanged=False)
    assert alpha is None
    assert "rejuvenated already" in text
    assert ("a smaller alpha" in text) == (level in ("at risk", "collapsed"))


def test_drift_is_told_in_the_order_of_the_layers_and_fits_a_screen():
    """Thirty layers of two tensors, three layers a row; and of eight other tensors those that moved furthest."""
    tensors = {
        f"model.layers.{n}.{part}": TensorStatistics(size * (n + 1), 4.0, 10, 10, 5)
        for n in range(30)
        for part, size in (("a", 1e-4), ("b", 3e-4))
    }
    tensors |= {f"other.{n}": TensorStatistics(1e-6 * (n + 1), 1.0, 10, 10, 0) for n in range(8)}
    verdict = verdict_on(None, unchanged=False)
    found = Diagnosis("b", "s", tensors, (), None, verdict.level, verdict.reasons, "", None)
    rows = [line.split() for line in str(found).partition("changed\n")[2].splitlines()]
    assert [row[1] for row in rows[:10]] == [f"{n}-{n + 2}" for n in range(0, 30, 3)]
    for row, first in zip(rows, range(0, 30, 3), strict=False):
        squares = sum(4e-4 * (n + 1) for n in range(first, first + 3))
        assert row[2:] == [f"{math.sqrt(squares / (6 * 4.0)):#.3g}", "50.0%"]
    assert [row[0] for row in rows[10:]] == ["other.7", "other.6", "other.5", "other.4"]


def test_json_holds_no_nan_and_the_keys_stay():
    measured = behaviour(math.nan, 0.0, entropy=(0.2, 0.0))
    verdict = verdict_on(measured, unchanged=False)
    text, alpha = recommend(verdict, measured, None, unchanged=False)
    found = Diagnosis(
        "b",
        "s",
        {"w": TensorStatistics(1.0, 0.0, 4)},
        (),
        measured,
        verdict.level,
        verdict.reasons,
        text,
        alpha,
    )
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["behaviour"]["support_retention"] is None
    assert plain["behaviour"]["entropy_ratio"] is None
    assert plain["verdict"] == "collapsed"
    assert {
        "base",
        "sft",
        "verdict",
        "reason",
        "alpha",
        "total",
        "layers",
        "tensors",
        "findings",
    } < plain.keys()
    assert "alpha found" in str(found)


def test_the_thresholds_go_by_the_length_of_the_responses_that_support_is_measured_on():
    ids = torch.arange(1, 13).view(2, 6)
    labels = ids.clone()
    labels[0, :2] = -100  # four tokens
    labels[1, :3] = labels[1, 5:] = -100  # two
    samples = [{"input_ids": ids, "labels": labels}, {"input_ids": ids[:1], "labels": labels[:1]}]
    lengths = _Lengths(lambda model: iter(samples))
    assert len(list(lengths.of_all(None))) == 2
    assert lengths.mean == (4 + 2 + 4) / 3
    check = lengths.of_right(lambda batch: torch.tensor([False, True])[: len(batch["labels"])])
    assert [check(batch).tolist() for batch in samples] == [[False, True], [False]]
    assert lengths.mean == 2
