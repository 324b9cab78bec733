from __future__ import annotations

import pytest

from studies.analysis.comparisons import (
    CONFIRMATORY,
    EXPLORATORY,
    RULES,
    SECOND,
    VARIANTS,
    compare,
    confirmed,
)
from studies.analysis.results import PLANNED, load
from studies.analysis.statistics import holm
from tests.studies.analysis.made_up import record, study, write


def _load(root):
    return load(root / "docs" / "results" / "study")


def test_every_compared_arm_is_planned():
    for pair in (*CONFIRMATORY, *SECOND, *EXPLORATORY, *VARIANTS, *RULES):
        assert {pair.ours, pair.theirs} <= set(PLANNED)


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


def test_the_second_family_counts_later_seeds_only_and_pools(tmp_path):
    for task, ours in (("retail_desk", 0.9), ("running_total", 0.7)):
        for seed in range(1001, 1011):
            arms = {"rigid_entropy": record(ours if seed >= 1008 else 0.0), "rigid_random": record(0.2)}
            write(tmp_path, task, seed, arms)
    found = compare(SECOND, _load(tmp_path), test=True, since=1008)
    rows = {row.task: row.difference for row in found if row.outcome == "id"}
    assert (rows["retail_desk"].estimate.n, rows["all"].estimate.n) == (3, 6)
    assert rows["all"].estimate.value == pytest.approx(0.6)
    adjusted = confirmed(found, pooled_tasks=True)
    assert adjusted == {"all: rigid_entropy - rigid_random": pytest.approx(2 / 2**6)}
