"""The rules on lines whose answer is known, and the tables of docs/alpha.md from made-up results."""

from __future__ import annotations

import json

import pytest

from lightning_rejuv.alpha import GRID, AlphaPoint
from studies import alpha_rules
from studies.alpha_rules import RULES, Curve, of_rule, table_of_rules, table_of_runs
from studies.analysis.markdown import places

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
    rows = table_of_rules([Curve("Y", LINE, (0.3, 0.5), True)]).splitlines()
    name, window, bargain, equal, *_, excess = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert (name, window) == ("Y, chose it", "0.3\N{EN DASH}0.5")
    assert bargain == "0.50"  # where (a / .8) (1 - a) is largest
    assert equal == "0.44"
    assert excess == "0.05 ✗"


def test_the_runs_are_counted(tmp_path):
    for seed, end in ((1, 0.9), (2, 0.49)):
        record = {split: {"end": {"pass_at_1": end}} for split in ("id", "ood")}
        file = tmp_path / "running_total" / f"seed_{seed}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"arms": {"today": record}}))
    (row,) = [line for line in table_of_runs(tmp_path).splitlines() if "Running" in line]
    assert "fusion, alpha auto | 1 of 2 | 0.70 | 0.70" in row.replace("0.69", "0.70")


def test_the_page_is_what_the_raw_results_say():
    page = alpha_rules.PAGE.read_text()
    made = {"rules": table_of_rules(alpha_rules.curves()), "runs": table_of_runs()}
    assert {place[1] for place in places("alpha").finditer(page)} == set(made)
    for text in made.values():
        assert text in page
