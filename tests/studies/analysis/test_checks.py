from __future__ import annotations

from studies.analysis.checks import DEFAULT, EARLIER, NAMED, target_checks
from studies.analysis.results import load
from studies.analysis.statistics import holm
from studies.arms import SECOND_SEEDS
from studies.passes import passes
from tests.studies.analysis.made_up import record, study, write


def _load(root):
    return load(root / "docs" / "results" / "study")


def _checks(root, **ends):
    """Checks of `auto_reset` on the retail desk in distribution, from end points by arm for some seeds."""
    for number, seed in enumerate(range(1001, 1001 + len(next(iter(ends.values()))))):
        write(root, "retail_desk", seed, {arm: record(each[number]) for arm, each in ends.items()})
    return {c.theirs: c for c in target_checks(_load(root)) if c.ours == "auto_reset" and c.split == "id"}


def test_checks_ask_for_an_interval_above_zero(tmp_path):
    checks = _checks(
        tmp_path,
        auto_reset=[0.9, 0.92, 0.91, 0.93],
        sft_8=[0.91, 0.90, 0.92, 0.90],  # 0.0075 lower on average, not told apart: as good is enough
        sft_64=[0.3, 0.31, 0.28, 0.3],
        base=[0.9, 0.1, 0.95, 0.2],  # lower on average, but by no means always
        hot=[0.95, 0.96, 0.97, 0.95],
    )
    passed = {arm: check.passed for arm, check in checks.items()}
    assert passed == {"sft_8": True, "sft_64": True, "base": False, "hot": False}
    assert [check.strict for check in checks.values()] == [False, True, True, True]


def test_a_better_moderate_sft_fails_the_check(tmp_path):
    checks = _checks(tmp_path, auto_reset=[0.90, 0.92], sft_8=[0.91, 0.92])
    assert not checks["sft_8"].passed


def test_one_seed_decides_nothing(tmp_path):
    checks = _checks(tmp_path, auto_reset=[0.9], sft_8=[0.8], sft_64=[0.3])
    assert [check.passed for check in checks.values()] == [None, None]


def test_checks_are_three_families(tmp_path):
    study(tmp_path, seeds=[*range(1001, 1005), *range(1021, 1025)])
    checks = target_checks(_load(tmp_path))
    families = [((DEFAULT,), False, 8), ((DEFAULT,), True, 4), (NAMED, False, 8)]
    for forms, fresh, seeds in families:
        family = [check for check in checks if check.ours in forms and check.fresh is fresh]
        assert len(family) == len(forms) * 2 * 2 * 9  # tasks, splits, what they are held against
        assert {check.difference.estimate.n for check in family} == {seeds}
        adjusted = holm({str(i): check.difference.p for i, check in enumerate(family)})
        assert [check.p_holm for check in family] == [adjusted[str(i)] for i in range(len(family))]
    assert len(checks) == (1 + 1 + 2) * 2 * 2 * 9


def test_fresh_checks_see_the_second_set_of_seeds_alone(tmp_path):
    for seed in (1019, 1020, 1021, 1022, 1040):
        arms = {DEFAULT: record(0.9 if seed in SECOND_SEEDS else 0.1), "sft_64": record(0.3)}
        write(tmp_path, "retail_desk", seed, arms)
    found = {
        check.fresh: (check.difference.estimate.n, round(check.difference.estimate.value, 3), check.passed)
        for check in target_checks(_load(tmp_path))
        if check.split == "id"
    }
    assert found == {False: (5, 0.28, False), True: (3, 0.6, True)}


def test_the_second_set_has_what_fresh_checks_ask_for():
    for task, moderate in (("retail_desk", "sft_8"), ("running_total", "sft_2")):
        second = {arm for of_task in passes(task) if of_task.seeds == SECOND_SEEDS for arm in of_task.arms}
        assert {DEFAULT, moderate, "sft_64", *EARLIER} <= second
