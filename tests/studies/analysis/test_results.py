from __future__ import annotations

import pytest

from studies.analysis.results import auc, end, gain, load, pooled, succeeded, unfinished
from studies.arms import FIRST_SEEDS, REPORTED_SEEDS, SECOND_SEEDS
from studies.passes import passes
from tests.studies.analysis.made_up import SETTINGS, record, write


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


def _by_plan(root, task="retail_desk", left_out=()):
    for seed in REPORTED_SEEDS:
        planned = {arm for of_task in passes(task) if seed in of_task.seeds for arm in of_task.arms}
        arms = {arm: record(0.5) for arm in planned if (seed, arm) not in left_out}
        write(root, task, seed, arms)


def test_a_study_is_finished_when_every_arm_has_the_seeds_planned_for_it(tmp_path):
    """Some arms are planned for one set of seeds alone and have no more than that."""
    _by_plan(tmp_path)
    (task,) = _load(tmp_path).values()
    assert len(task.records("hot")) == len(task.records("sft_32")) == 20
    assert unfinished(task) == {}


def test_what_is_missing_is_counted_within_the_plan(tmp_path):
    left_out = {(1003, "hot"), (1030, "sft_64"), *((seed, "auto_kl") for seed in SECOND_SEEDS)}
    _by_plan(tmp_path, left_out=left_out)
    for seed in FIRST_SEEDS[:3]:  # a control that is planned for the second set only
        (task,) = _load(tmp_path).values()
        write(tmp_path, "retail_desk", seed, {**task.seeds[seed], "auto_kl": record(0.5)})
    (task,) = _load(tmp_path).values()
    assert len(task.records("auto_kl")) == 3
    assert unfinished(task) == {"sft_64": (39, 40), "auto_kl": (0, 20), "hot": (19, 20)}


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
