from __future__ import annotations

import pytest

from studies.analysis.comparisons import (
    CONFIRMATORY,
    EXPLORATORY,
    RULES,
    SECOND,
    THIRD,
    VARIANTS,
    compare,
    confirmed,
)
from studies.analysis.results import load
from studies.analysis.statistics import holm
from studies.arms import FIRST_SEEDS, SECOND_SEEDS
from studies.passes import FIRST_TASKS, passes
from tests.studies.analysis.made_up import record, study, write


def _load(root):
    return load(root / "docs" / "results" / "study")


def _planned(task, arm):
    return {seed for of_task in passes(task) if arm in of_task.arms for seed in of_task.seeds}


@pytest.mark.parametrize("task", FIRST_TASKS)
def test_both_sides_of_every_pair_are_planned_for_the_seeds_that_count(task):
    for family in (SECOND, THIRD):
        for pair in family.pairs:
            assert set(family.seeds) <= _planned(task, pair.ours) & _planned(task, pair.theirs), pair.name
    for pair in (*CONFIRMATORY, *EXPLORATORY, *VARIANTS, *RULES):
        assert _planned(task, pair.ours) & _planned(task, pair.theirs), pair.name


def test_no_seed_counts_for_two_of_the_later_families():
    assert SECOND.seeds == tuple(range(1008, 1021))
    assert THIRD.seeds == SECOND_SEEDS
    assert set(SECOND.seeds) < set(FIRST_SEEDS)


def test_compare_pairs_by_seed_and_pools_tasks(tmp_path):
    for seed, ours, theirs in ((1001, 0.9, 0.2), (1002, 0.8, 0.3), (1003, 0.9, None)):
        arms = {"rigid_reset": record(ours)}
        if theirs is not None:
            arms["rigid_random"] = record(theirs)
        write(tmp_path, "retail_desk", seed, arms)
    write(tmp_path, "running_total", 1001, {"rigid_reset": record(0.1), "rigid_random": record(0.4)})
    found = compare(CONFIRMATORY, _load(tmp_path), test=True)
    assert {row.pair for row in found} == {CONFIRMATORY[0]}
    rows = {(row.task, row.outcome): row.difference for row in found}
    assert rows["retail_desk", "id"].estimate.n == 2
    assert rows["retail_desk", "id"].estimate.value == pytest.approx(0.6)
    assert rows["running_total", "id"].estimate[1:] == (pytest.approx(-0.3), None, None)
    assert rows["all", "id"].estimate.n == 3
    assert rows["all", "id"].estimate.value == pytest.approx((0.7 + 0.5 - 0.3) / 3)
    assert (rows["all", "id"].wins, rows["all", "id"].losses) == (2, 1)
    assert rows["retail_desk", "auc"].estimate.value == pytest.approx(0.6 / 4)
    assert rows["retail_desk", "ood"].p is None  # a test for the primary outcome only


def test_only_tasks_by_themselves_are_confirmatory(tmp_path):
    study(tmp_path, keep=lambda task, seed, arm: arm.startswith("rigid"))
    found = compare(CONFIRMATORY, _load(tmp_path), test=True)
    adjusted = confirmed(found)
    names = {f"{task}: {pair.name}" for task in ("retail_desk", "running_total") for pair in CONFIRMATORY[:4]}
    assert set(adjusted) == names
    raw = {
        f"{row.task}: {row.pair.name}": row.difference.p
        for row in found
        if row.outcome == "id" and row.task != "all"
    }
    assert adjusted == holm(raw)


@pytest.mark.parametrize(
    ("family", "theirs", "seeds", "value"),
    [(SECOND, "rigid_random", 3, 0.6), (THIRD, "rigid_entropy_random", 2, 0.2)],
)
def test_a_later_family_counts_its_seeds_only_and_pools(tmp_path, family, theirs, seeds, value):
    """Ours lead by 0, 0.7 or 0.5, and 0.1 or 0.3, before, within and after the seeds of the second family."""
    for task, within, after in (("retail_desk", 0.9, 0.3), ("running_total", 0.7, 0.5)):
        for seed in (1006, 1007, 1008, 1009, 1020, 1021, 1040):
            end = 0.2 if seed < 1008 else within if seed < 1021 else after
            write(tmp_path, task, seed, {"rigid_entropy": record(end), theirs: record(0.2)})
    found = compare(family.pairs, _load(tmp_path), test=True, seeds=family.seeds)
    rows = {row.task: row.difference for row in found if row.outcome == "id"}
    assert (rows["retail_desk"].estimate.n, rows["all"].estimate.n) == (seeds, 2 * seeds)
    assert rows["all"].estimate.value == pytest.approx(value)
    adjusted = confirmed(found, pooled_tasks=True)
    assert adjusted == {f"all: rigid_entropy - {theirs}": pytest.approx(2 / 2 ** (2 * seeds))}


def test_a_later_family_is_adjusted_over_its_own_pairs(tmp_path):
    study(tmp_path, seeds=range(1019, 1024), keep=lambda task, seed, arm: "_reset" in arm or "rigid" in arm)
    tasks = _load(tmp_path)
    for family in (SECOND, THIRD):
        found = compare(family.pairs, tasks, test=True, seeds=family.seeds)
        raw = {
            f"all: {row.pair.name}": row.difference.p
            for row in found
            if row.task == "all" and row.outcome == "id"
        }
        assert {name.partition(": ")[2] for name in raw} == {
            pair.name for pair in family.pairs if pair.theirs != "auto_nll_100"
        }
        assert confirmed(found, pooled_tasks=True) == holm(raw)
