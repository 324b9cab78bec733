from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from studies.analysis.forecast import (
    Start,
    clustered_auc,
    measures_of,
    roc_auc,
    spearman_within_seed,
    starts,
)
from studies.analysis.results import load
from tests.studies.analysis.made_up import record, write


def _random_starts(seeds=8, arms=12, informative=1.0):
    draws = np.random.default_rng(3)
    found = []
    for seed in range(seeds):
        for arm in range(arms):
            value = round(float(draws.normal()), 1)  # rounded, so that there are ties
            end = 1 / (1 + np.exp(-informative * value - draws.normal()))
            found.append(Start("retail_desk", seed, f"arm{arm}", {"x": value}, float(end), bool(end >= 0.5)))
    return found


def test_starts_count_each_model_once(tmp_path):
    twin = record(0.9, same_as="auto_nll_100")
    write(
        tmp_path,
        "retail_desk",
        1001,
        {
            "base": record(0.0, support=0.0),
            "sft_4": record(0.8),
            "sft_8": record(0.9),
            "sft_64": record(0.3, support=-10.0),
            "fusion_10": record(0.1),
            "fusion_30": record(0.9),
            "auto_nll_100": record(0.9),
            "rigid": twin,
            "hot": record(0.4),
        },
    )
    (task,) = load(tmp_path / "docs" / "results" / "study").values()
    found = starts([task])
    assert [start.arm for start in found] == [
        "base",
        "sft_4",
        "sft_8",
        "sft_64",
        "fusion_10",
        "fusion_30",
        "auto_nll_100",
    ]
    side = [start.arm for start in starts([task], over_trained_side=True)]
    assert side == ["sft_8", "sft_64", "fusion_30", "auto_nll_100"]
    by_arm = {start.arm: start for start in found}
    assert by_arm["base"].measures["token_entropy_ratio"] == 1.0
    assert by_arm["sft_64"].measures["token_entropy_ratio"] == pytest.approx(0.0, abs=1e-9)
    assert "verified_support" not in measures_of(found)  # null in the file
    assert (by_arm["sft_8"].success, by_arm["sft_64"].success) == (True, False)


def test_spearman_is_the_mean_over_seeds_of_scipys():
    found = _random_starts()
    each = [
        spearmanr([s.measures["x"] for s in group], [s.end for s in group]).statistic
        for seed in range(8)
        for group in [[s for s in found if s.seed == seed]]
    ]
    estimate = spearman_within_seed(found, "x")
    assert (estimate.n, estimate.value) == (8, pytest.approx(np.mean(each)))
    assert spearman_within_seed(found, "y") is None


def test_spearman_ignores_what_differs_between_seeds():
    """Within a seed more is worse; pooled over seeds it would look better."""
    found = [
        Start("t", seed, f"{arm}", {"x": 10.0 * seed - arm}, seed + 0.1 * arm, True)
        for seed in range(3)
        for arm in range(4)
    ]
    assert spearman_within_seed(found, "x").value == pytest.approx(-1.0)


def test_roc_auc_is_sklearns():
    found = _random_starts()
    values, outcomes = [s.measures["x"] for s in found], [s.success for s in found]
    estimate = roc_auc(found, "x")
    assert estimate.value == pytest.approx(roc_auc_score(outcomes, values))
    assert estimate.low < estimate.value < estimate.high
    assert estimate == roc_auc(found, "x")
    assert roc_auc([s for s in found if s.success], "x") is None


def test_bootstrap_resamples_whole_seeds():
    found = _random_starts(seeds=5)
    draws = np.array([[0, 0, 2, 3, 3], [4, 4, 4, 4, 1]])
    times = np.stack([np.bincount(draw, minlength=5) for draw in draws])
    expected = []
    for draw in draws:
        drawn = [start for seed in draw for start in found if start.seed == seed]
        expected.append(roc_auc_score([s.success for s in drawn], [s.measures["x"] for s in drawn]))
    assert clustered_auc(found, "x", times) == pytest.approx(np.array(expected))


def test_bootstrap_of_clusters_is_wider_than_of_starts():
    """Copies of one start in every seed add no evidence: the interval must not shrink."""
    found = _random_starts(seeds=10, arms=6)
    copied = [s._replace(arm=f"{s.arm}{copy}") for s in found for copy in range(5)]
    once, many = roc_auc(found, "x"), roc_auc(copied, "x")
    assert many.n == 5 * once.n
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
