"""The rules on lines whose answer is known, and the tables of docs/alpha.md from made-up results."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_rejuv.alpha.search import GRID, AlphaPoint
from studies import alpha_rules
from studies.alpha_rules import RULES, Curve, of_rule, table_of_rules, table_of_runs
from studies.analysis.markdown import places
from studies.files import seeds_as_lines
from studies.real.arms import ARMS as REAL_ARMS
from studies.real.arms import FIXED
from studies.real.jobs import Job
from studies.real.recipes import RECIPES
from studies.real.record import Record

# Demonstrations fall by 10 nats to .8 and rise again; the base's samples lose 20 nats, evenly.
LINE = [AlphaPoint(a, 3 + 12.5 * abs(a - 0.8), 7 + 20 * a, 1.0) for a in GRID]


@pytest.mark.parametrize(
    ("rule", "alpha"),
    [
        ("equal shares", 0.444),  # 1 - a / .8 = a
        ("lowest sum", 0.0),  # a nat and a quarter lost for .125 gained
        ("lowest demonstrations", 0.8),
        ("demonstrations within 1 nat", 0.72),
        ("1 nat of excess", 0.05),
    ],
)
def test_a_line_whose_answer_is_known(rule, alpha):
    assert of_rule(RULES[rule], LINE) == pytest.approx(alpha, abs=0.0011)


def test_an_alpha_outside_of_the_window_is_marked():
    rows = table_of_rules([Curve("Y", LINE, ((0.3, 0.5),), True)]).splitlines()
    name, window, auto, bargain, equal, *_, excess = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert (name, window) == ("Y, a test", "0.3\N{EN DASH}0.5")
    assert auto == "0.40"
    assert bargain == "0.50"  # where (a / .8) (1 - a) is largest
    assert equal == "0.44"
    assert excess == "0.05 ✗"


def test_the_runs_are_counted(tmp_path):
    contents = {
        seed: {
            "seed": seed,
            "arms": {"bargain": {split: {"end": {"pass_at_1": end}} for split in ("id", "ood")}},
        }
        for seed, end in ((1, 0.9), (2, 0.49))
    }
    (tmp_path / "running_total.jsonl").write_text(seeds_as_lines(contents))
    (row,) = [line for line in table_of_runs(tmp_path).splitlines() if "Running" in line]
    assert "fusion, the bargain's alpha | 1 of 2 | 0.70 | 0.70" in row.replace("0.69", "0.70")


def test_the_studys_own_searches_are_rows_of_the_table(tmp_path):
    raw, edit = tmp_path / "alpha", {"alpha": 0.4, "search": {"curve": [vars(point) for point in LINE]}}
    for seed, start in ((101, {"edit": edit}), (102, {"edit": edit})):
        Record(tmp_path / "real", RECIPES["V"], seed).add(Job("start", "V", seed, "fusion"), start)
    Record(tmp_path / "real", RECIPES["X"], 101).add(Job("start", "X", 101, "excessive"), {"edit": None})
    # As text: a figure that was not measured is no number and equals nothing.
    assert repr(alpha_rules.curves(raw)) == repr([Curve("V", LINE, ((0.4, 0.55),))] * 2)
    (row,) = table_of_rules(alpha_rules.curves(raw)).splitlines()[2:]
    assert row.startswith("| V, 2 seeds |")


def _line(root, ends):
    """Results of recipe R: pass@1 after RL by arm."""
    record = Record(root / "real", RECIPES["R"], 101)
    measures = {"pass_at_1": 0.1, "pass_at_k": 0.3, "format": 0.8}
    for arm, end in ends.items():
        fixed = FIXED.get(arm, 0.44)
        edit = None if arm == "excessive" else {"alpha": fixed, "search": None}
        if arm == "fusion":
            edit["search"] = {"curve": [dataclasses.asdict(point) for point in LINE]}
        record.add(Job("start", "R", 101, arm), {"edit": edit, "id": measures})
        curves = {"reward": [end]}
        made = REAL_ARMS[arm].recipe()
        record.add(Job("arm", "R", 101, arm, 201), {"made": made, "id": {"pass_at_1": end}, "curves": curves})


def test_a_window_reaches_half_of_the_best_and_more_than_rl_can_do_nothing_with(tmp_path):
    ends = {"fused_20": 0.2, "fused_30": 0.35, "fused_40": 0.6, "fused_50": 0.5, "fused_60": 0.24}
    _line(tmp_path, {"excessive": 0.05, "fusion": 0.55, **ends})
    (runs,) = alpha_rules.lines(tmp_path)
    assert [round(alpha_rules.alpha_of(run), 2) for run in runs] == [0.2, 0.3, 0.4, 0.44, 0.5, 0.6, 1.0]
    assert alpha_rules.windows(runs) == ((0.3, 0.5),)
    (row,) = [line for line in alpha_rules.table_of_lines(tmp_path).splitlines() if "alpha auto" in line]
    assert row == "| R: fusion, alpha auto | 0.44 | 0.10 | 0.30 | 0.80 | **0.55** | 0.55 |"
    (curve,) = [curve for curve in alpha_rules.curves(tmp_path) if curve.name == "R"]
    assert (curve.windows, curve.tests, repr(curve.points)) == (((0.3, 0.5),), True, repr(LINE))


def test_an_alpha_that_rl_failed_from_is_right_for_no_rule_whatever_is_right_around_it(tmp_path):
    ends = {"fused_20": 0.1, "fused_30": 0.5, "fused_40": 0.1, "fused_50": 0.5, "fused_60": 0.6}
    _line(tmp_path, {"excessive": 0.05, "fusion": 0.1, **ends})
    (runs,) = alpha_rules.lines(tmp_path)
    assert alpha_rules.windows(runs) == ((0.3, 0.3), (0.5, 0.6))
    (row,) = table_of_rules(alpha_rules.curves(tmp_path)).splitlines()[2:]
    assert row.startswith("| R, a test | 0.3, 0.5\N{EN DASH}0.6 | 0.40 ✗ | 0.50 |")


def test_a_line_whose_excessive_sft_rl_improves_is_no_test(tmp_path):
    _line(tmp_path, {"excessive": 0.5, "fusion": 0.6, "fused_40": 0.6})
    (runs,) = alpha_rules.lines(tmp_path)
    assert alpha_rules.windows(runs) == ()


def test_a_line_on_which_rl_never_succeeds_has_no_window(tmp_path):
    _line(tmp_path, {"excessive": 0.05, "fusion": 0.2, "fused_40": 0.2})
    (runs,) = alpha_rules.lines(tmp_path)
    assert alpha_rules.windows(runs) == ()
    assert alpha_rules.curves(tmp_path) == []


def test_the_page_is_what_the_raw_results_say():
    page = alpha_rules.PAGE.read_text()
    made = alpha_rules.tables()
    assert {place[1] for place in places("alpha").finditer(page)} == set(made)
    for text in made.values():
        assert text in page
