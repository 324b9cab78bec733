from __future__ import annotations

import pytest

from studies.analysis.results import auc, end, gain, load, pooled, succeeded
from tests.studies.analysis.made_up import SETTINGS, record, study, write


def _load(root):
    return load(root / "docs" / "results" / "study")


def test_reads_what_is_there(tmp_path):
    write(tmp_path, "running_total", 1002, {"base": record(0.3)})
    write(tmp_path, "retail_desk", 1002, {"base": record(0.1), "sft_64": record(0.4)})
    write(tmp_path, "retail_desk", 1001, {"sft_64": record(0.6)})
    write(tmp_path, "retail_desk", 1003, {})
    write(tmp_path, "retail_desk", 905, {"base": record(0.99)}, kind="tuning")
    tasks = _load(tmp_path)
    assert list(tasks) == ["retail_desk", "running_total"]
    desk = tasks["retail_desk"]
    assert (list(desk.seeds), desk.tuning) == ([1001, 1002], [905])
    assert desk.arms == ["base", "sft_64"]
    assert desk.values("sft_64", end("id")) == {1001: 0.6, 1002: 0.4}
    assert desk.values("base", end("id")) == {1002: 0.1}
    assert desk.values("hot", end("id")) == {}
    assert (desk.moderate, tasks["running_total"].moderate) == ("sft_8", "sft_2")
    assert pooled(list(tasks.values()), "base", end("id")) == {
        ("retail_desk", 1002): 0.1,
        ("running_total", 1002): 0.3,
    }


def test_outcomes():
    found = record(0.5)
    assert gain("id")(found) == pytest.approx(0.4)
    assert end("ood")(found) == pytest.approx(0.4)
    assert auc(found) == pytest.approx((0.1 + 0.2 + 0.3 + 0.5) / 4)
    assert succeeded(found)
    assert not succeeded(record(0.49999))


def test_a_task_with_tuning_seeds_alone_is_not_reported(tmp_path):
    write(tmp_path, "retail_desk", 905, {"base": record(0.99)}, kind="tuning")
    assert _load(tmp_path) == {}


def test_summary_beside_the_seeds_is_not_read(tmp_path):
    study(tmp_path, seeds=[1001], keep=lambda task, seed, arm: arm == "base")
    (tmp_path / "docs" / "results" / "study" / "summary.json").write_text("no JSON")
    assert len(_load(tmp_path)) == 2


@pytest.mark.parametrize("arm", ["sft_65", "tuning_omega_50"])
def test_refuses_arms_that_are_not_reported(tmp_path, arm):
    write(tmp_path, "retail_desk", 1001, {arm: record(0.5)})
    with pytest.raises(ValueError, match=f"seed 1001 of retail_desk has {arm}"):
        _load(tmp_path)


def test_refuses_mixed_settings(tmp_path):
    write(tmp_path, "retail_desk", 1001, {"base": record(0.5)})
    write(tmp_path, "retail_desk", 1002, {"base": record(0.5)}, settings={**SETTINGS, "rl_steps": 160})
    with pytest.raises(ValueError, match="same settings but seed 1002 of retail_desk"):
        _load(tmp_path)


def test_refuses_an_unknown_task(tmp_path):
    write(tmp_path, "chess", 1001, {"base": record(0.5)})
    with pytest.raises(ValueError, match="'chess'"):
        _load(tmp_path)
