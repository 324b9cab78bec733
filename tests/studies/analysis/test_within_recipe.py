from __future__ import annotations

import json

import numpy as np
import pytest

from studies.analysis import within_recipe
from studies.analysis.forecast import Start, times_drawn
from studies.analysis.real_forecast import by_recipe, real_forecast_of, real_starts
from studies.analysis.results import load
from studies.analysis.within_recipe import by_arm, concordance, rows_of, with_references
from tests.studies.analysis.made_up import record, write


def _made_up(seeds=9, arms=5, of_arm=3.0):
    """The arm decides value and outcome; within it a value says a little."""
    draws = np.random.default_rng(7)
    found = []
    for seed in range(seeds):
        for arm in range(arms):
            noise = draws.normal()
            value = round(of_arm * (arm - 2) + noise, 1)
            end = 1 / (1 + np.exp(-(arm - 2) - 0.8 * noise - draws.normal()))
            found.append(Start("t", seed, f"arm{arm}", {"x": value}, float(end), bool(end >= 0.5)))
    return found


def _brute_force(found):
    """Pair by pair; pairs of different arms are left out."""
    won = pairs = 0.0
    for up in found:
        for down in found:
            if up.arm == down.arm and up.success and not down.success:
                pairs += 1
                won += (up.measures["x"] > down.measures["x"]) + 0.5 * (
                    up.measures["x"] == down.measures["x"]
                )
    return won / pairs, pairs


def test_the_area_is_that_of_brute_force():
    found = _made_up()
    area, pairs = _brute_force(found)
    row = concordance(found, "x")
    assert row.area.value == pytest.approx(area)
    assert row.pairs == pairs
    mixed = [arm for arm in {s.arm for s in found} if len({s.success for s in found if s.arm == arm}) == 2]
    assert row.strata == len(mixed)
    assert row.area.n == 9 * len(mixed)


def test_the_interval_is_that_of_resampled_seeds(monkeypatch):
    """The percentiles of brute force over the very draws of the bootstrap."""
    found = _made_up(seeds=5, arms=3)
    few = times_drawn(5)[:200]
    monkeypatch.setattr(within_recipe, "times_drawn", lambda clusters: few)
    areas = []
    for times in few:
        drawn = [s for s in found for _ in range(int(times[s.seed]))]
        outcomes = [{s.success for s in drawn if s.arm == arm} for arm in {s.arm for s in drawn}]
        if any(len(both) == 2 for both in outcomes):
            areas.append(_brute_force(drawn)[0])
    row = concordance(found, "x")
    assert (row.area.low, row.area.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))


def test_what_only_tells_arms_apart_is_a_guess_within_them():
    found = [
        Start("t", seed, arm, {"x": value}, float(success), success)
        for arm, value, rate in (("a", 1.0, 8), ("b", 0.0, 2))
        for seed in range(10)
        for success in [seed < rate]
    ]
    row = rows_of(found, {"within": by_arm})["measures"]["x"]
    assert row["all"]["value"] == pytest.approx(0.8)  # 8 x 8 pairs won, 8 x 2 + 2 x 8 tied, 2 x 2 lost
    assert (row["within"]["value"], row["within"]["pairs"]) == (0.5, 32)


def test_without_both_outcomes_in_an_arm_there_is_nothing_to_say():
    found = [Start("t", seed, arm, {"x": 0.0}, 0.0, arm == "a") for arm in "ab" for seed in range(3)]
    assert concordance(found, "x") is None
    assert concordance(found, "x", by_recipe).pairs == 9


def test_references_of_a_start(tmp_path):
    base, fused = record(0.0), record(0.9, alpha=0.3)
    base["id"]["start"]["style_rate"] = 0.27
    arms = {"base": base, "sft_64": record(0.3), "fusion_30": fused}
    write(tmp_path, "retail_desk", 1001, arms)
    write(tmp_path, "retail_desk", 1002, {"sft_64": record(0.3)})
    found = with_references(list(load(tmp_path / "docs" / "results" / "study").values()))
    measures = {(start.seed, start.arm): start.measures for start in found}
    assert [measures[1001, arm]["alpha"] for arm in arms] == [0.0, 1.0, 0.3]
    assert measures[1001, "sft_64"]["base_style_rate"] == 0.27
    assert measures[1001, "sft_64"]["style_rate"] == 0.2
    assert measures[1002, "sft_64"]["base_solved"] == 46 / 96
    assert "base_style_rate" not in measures[1002, "sft_64"]


def _real_seed(path, recipe, seed, ends):
    """Arms by name: pass@1 before RL, the edit, and pass@1 after RL by RL seed."""
    names = ("pass_at_k", "zero_variance", "format", "worked", "entropy", "length")
    starts = {
        arm: {"edit": edit, "id": {"pass_at_1": before, **dict.fromkeys(names, 0.5)}, "knowledge": None}
        for arm, (before, edit, _) in ends.items()
    }
    arms = {
        arm: {str(n): {"id": {"pass_at_1": end}} for n, end in enumerate(after)}
        for arm, (_, _, after) in ends.items()
    }
    arms["hot"] = {"0": {"id": {"pass_at_1": 0.9}}}  # another RL, from a start that is there already
    path.mkdir(parents=True, exist_ok=True)
    content = {"recipe": recipe, "sft_seed": seed, "starts": starts, "arms": arms}
    (path / f"seed_{seed}.json").write_text(json.dumps(content))


def test_starts_on_a_real_model(tmp_path):
    edit = {"alpha": 0.4, "drift_before": 0.002, "drift_after": 0.0008}
    for seed, before, fused in ((101, 0.8, 0.6), (102, 0.3, 0.1)):
        ends = {
            "excessive": (0.3, None, [0.1]),
            "fusion": (before, edit, [fused, fused]),
            "moderate": (0.3, None, [0.5]),
        }
        _real_seed(tmp_path / "real" / "V", "V", seed, ends)
    found = real_starts(tmp_path)
    assert len(found) == 8
    by_arm_of = {start.arm: start for start in found}
    assert by_arm_of["excessive"].measures["drift"] == 0.002
    assert by_arm_of["fusion"].measures["alpha"] == 0.4
    assert "drift" not in by_arm_of["moderate"].measures
    assert (by_arm_of["moderate"].success, by_arm_of["excessive"].success) == (True, False)

    summary = real_forecast_of(tmp_path)
    assert summary["recipes"] == {"V": {"starts": 8, "successes": 4}}
    row = summary["measures"]["pass_at_1"]
    # Values .8 (twice) and .3 (twice) succeed; .3 (twice) and .3 (twice) fail.
    assert row["all"]["value"] == pytest.approx((2 * 4 + 2 * 4 * 0.5) / 16)
    assert (row["arm"]["value"], row["arm"]["pairs"], row["arm"]["strata"]) == (1.0, 4, 1)
    assert real_forecast_of(tmp_path / "nothing") is None
