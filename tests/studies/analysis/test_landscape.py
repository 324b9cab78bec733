from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr, t
from sklearn.metrics import roc_auc_score

from studies.analysis.landscape import (
    MEASURES,
    above_drift,
    conclusion,
    forecast_of,
    joined,
    landscape_of,
    over_trained_side,
)
from studies.analysis.landscape_tables import landscape_blocks
from studies.analysis.results import load
from studies.files import seeds_as_lines
from tests.studies.analysis.made_up import record, rows, write

TASKS = ("retail_desk", "running_total")
ENDS = {"sft_8": 0.9, "sft_64": 0.1, "fusion_20": 0.2, "fusion_40": 0.8, "fusion_60": 0.7}
# On demonstrations the over-trained start is flattest; on base samples the sharper one ends lower.
SHARP = {"base": 8.0, "sft_8": 7.0, "sft_64": 0.5, "fusion_20": 9.0, "fusion_40": 6.0, "fusion_60": 5.0}
REFIT = "refit_40"


def _measured(arm, seed, alpha):
    sharp = SHARP.get(arm, 3.0) * (1 + 0.01 * (seed % 7))
    curvature = {"sharpness": sharp, "sam_gap": sharp / 100, "relative_sam_gap": sharp / 200}
    inverse = {name: 1 / value for name, value in curvature.items()}
    drift = 0.1 if arm == "sft_64" else 0.05 if arm == "sft_8" else 0.02
    measures = {"relative_drift": drift, "token_entropy": 0.3, "support": -10 * drift}
    return {"alpha": alpha, "demonstrations": curvature, "base_samples": inverse, "measures": measures}


def _results(root, seeds=range(1021, 1026)):
    arms = [*SHARP, REFIT]
    for task in TASKS:
        lines = {}
        for seed in seeds:
            write(root, task, seed, {arm: record(end + 0.001 * (seed % 3)) for arm, end in ENDS.items()})
            alphas = {arm: int(arm[7:]) / 100 if arm.startswith("fusion") else None for arm in arms}
            lines[seed] = {
                "seed": seed,
                "base_as_recorded": seed == 1021,
                "where": {"cpu": "a processor", "torch": "2.13.0", "transformers": "5.24.0"},
                "arms": {arm: _measured(arm, seed, alphas[arm]) for arm in arms},
            }
        directory = root / "docs" / "results" / "landscape"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{task}.jsonl").write_text(seeds_as_lines(lines))
    results = root / "docs" / "results"
    return results, load(results / "study")


def test_measures_meet_the_outcome_of_the_same_arm_and_seed(tmp_path):
    results, tasks = _results(tmp_path)
    found = landscape_of(results, tasks)
    desk = found["tasks"]["retail_desk"]
    assert (desk["bases_as_recorded"], desk["arms"][REFIT]["end"], desk["arms"]["base"]["runs"]) == (
        1,
        None,
        0,
    )
    row = desk["arms"]["sft_64"]
    sharp = np.array([0.5 * (1 + 0.01 * (seed % 7)) for seed in range(1021, 1026)])
    half = t.ppf(0.975, 4) * sharp.std(ddof=1) / math.sqrt(5)
    estimate = row["measures"]["demonstrations/sharpness"]
    assert (estimate["value"], estimate["high"]) == pytest.approx((sharp.mean(), sharp.mean() + half))
    assert (row["successes"], row["runs"]) == (0, 5)
    assert found["forecast"]["all"]["counts"]["retail_desk"] == {"starts": 25, "successes": 15}
    change = desk["changes"]["demonstrations/sharpness"]["over_moderate"]
    assert change["value"] == pytest.approx(math.log(0.5 / 7.0))
    assert landscape_of(tmp_path, tasks) is None


def test_correlation_and_area_are_those_of_other_libraries(tmp_path):
    results, tasks = _results(tmp_path)
    row = landscape_of(results, tasks)["forecast"]["all"]["measures"]["demonstrations/sharpness"]
    of_desk = row["tasks"]["retail_desk"]
    sharp, ends = [SHARP[arm] for arm in ENDS], list(ENDS.values())
    assert of_desk["spearman"]["value"] == pytest.approx(spearmanr(sharp, ends).statistic)
    rising = [SHARP[arm] * (1 + 0.01 * (s % 7)) for s in range(1021, 1026) for arm in ENDS]
    outcomes = [end >= 0.5 for _ in range(5) for end in ENDS.values()]
    assert of_desk["roc_auc"]["value"] == pytest.approx(roc_auc_score(outcomes, rising))


def test_the_over_trained_side_leaves_out_what_lacks_the_form(tmp_path):
    _, tasks = _results(tmp_path)
    task = tasks["retail_desk"]
    found = joined(task, {1021: {"arms": {arm: _measured(arm, 1021, None) for arm in ENDS}}})
    assert len(found) == 5
    side = [start.arm for start in over_trained_side(task, found)]
    assert side == ["sft_8", "sft_64", "fusion_40", "fusion_60"]


def test_a_difference_of_areas_is_turned(tmp_path):
    """Drift says failure, the inverse of drift success: turned, both are as good."""
    _, tasks = _results(tmp_path)
    content = {s: {"arms": {a: _measured(a, s, None) for a in ENDS}} for s in range(1021, 1026)}
    found = [
        start._replace(measures={**start.measures, "inverse": -start.measures["relative_drift"]})
        for start in joined(tasks["retail_desk"], content)
    ]
    same = above_drift(found, "inverse", smaller=False, smaller_drift=True)
    assert (same.value, same.low, same.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    perfect = [
        start._replace(measures={**start.measures, "perfect": float(start.success)}) for start in found
    ]
    better = above_drift(perfect, "perfect", smaller=False, smaller_drift=True)
    outcomes, drift = [s.success for s in found], [s.measures["relative_drift"] for s in found]
    assert better.value == pytest.approx(roc_auc_score(outcomes, drift))  # 1 - (1 - area)
    assert better.low > 0


@pytest.mark.parametrize(
    ("correlations", "differences", "expected"),
    [
        ([(0.1, 0.5), (0.2, 0.6)], [(0.1, 0.01), (0.1, 0.02)], (True, True, True)),
        ([(-0.5, -0.1), (-0.6, -0.2)], [(0.1, -0.01), (0.1, 0.02)], (True, True, False)),
        ([(0.1, 0.5), (-0.6, -0.2)], [(0.1, 0.01), (0.1, 0.02)], (False, False, False)),  # signs differ
        ([(-0.1, 0.5), (0.2, 0.6)], [(0.1, 0.01), (0.1, 0.02)], (False, False, False)),
        ([(0.1, 0.5), (0.2, 0.6)], [(-0.1, -0.2), (0.1, 0.02)], (True, False, False)),
    ],
)
def test_the_rules_of_the_plan(correlations, differences, expected):
    """Pairs are the bounds of a correlation, and the value and lower bound of a difference, of each task."""
    by_task = [
        {"spearman": {"low": low, "high": high}, "above_drift": {"value": value, "low": below}}
        for (low, high), (value, below) in zip(correlations, differences, strict=True)
    ]
    assert tuple(conclusion(by_task).values()) == expected
    assert not conclusion([*by_task, {"spearman": None, "above_drift": None}])["says"]


def test_blocks(tmp_path):
    results, tasks = _results(tmp_path)
    found = landscape_of(results, tasks)
    made = landscape_blocks(found)
    assert ", 5/8 of those that were planned; the base is bit for bit" in made["landscape state"]
    assert "recorded one in 1/5" in made["landscape state"]
    start = rows(made["landscape starts running_total"])["SFT, 64 epochs (`sft_64`)"]
    assert start["successes"] == "0/5"
    assert start["`sharpness`, demonstrations"].startswith("0.5 ±")
    assert len(rows(made["landscape changes"])) == len(MEASURES)
    over = rows(made["landscape forecast all"])
    assert over["`relative_drift`"]["success goes with"] == "smaller"
    assert (
        "Over-trained against moderate, demonstrations: `sharpness` by a factor of 0.07 / "
        in (made["landscape findings"])
    )
    assert landscape_blocks(None) == {}
    assert forecast_of({"retail_desk": []})["measures"]["alpha"]["says"] is False
