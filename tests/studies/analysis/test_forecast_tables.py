from __future__ import annotations

import pytest

from studies.analysis.forecast_tables import areas, real_table, turned_areas, within_table
from studies.analysis.markdown import NONE
from tests.studies.analysis.made_up import rows


def _area(value, low=None, high=None):
    return {"n": 20, "value": value, "low": low, "high": high}


def _summary(**by_task):
    return {
        "tasks": {name: {"title": name.title()} for name in by_task},
        "forecast": {
            "all": {n: {"measures": {"x": {"roc_auc_held_out": row}}} for n, row in by_task.items()}
        },
    }


def test_an_area_below_one_half_is_turned_with_its_interval():
    summary = _summary(desk=_area(0.1, 0.05, 0.3), total=_area(0.6, 0.4, 0.7))
    found, smaller = turned_areas(summary, "all", "x")
    assert smaller
    assert [found["desk"][key] for key in ("low", "value", "high")] == pytest.approx([0.7, 0.9, 0.95])
    assert found["total"]["value"] == pytest.approx(0.4)  # a measure has one direction
    assert areas(summary, "all", "x") == (
        "`x` (the smaller the better) 0.90 [0.70, 0.95] (desk) and 0.40 [0.30, 0.60] (total)"
    )


def test_an_area_above_one_half_stays():
    found, smaller = turned_areas(_summary(desk=_area(0.8), total=None), "all", "x")
    assert (found, smaller) == ({"desk": _area(0.8)}, False)
    assert turned_areas(_summary(desk=None), "all", "x") == ({}, False)


def test_within_a_recipe_the_best_comes_first():
    within = {"strata": 3, "pairs": 40}
    measures = {
        "dull": {"all": _area(0.95), "within": {**_area(0.5), **within}},
        "sharp": {"all": _area(0.6, 0.5, 0.7), "within": {**_area(0.2, 0.1, 0.3), **within}},
        "lone": {"all": _area(0.7), "within": None},
    }
    summary = {"tasks": {"desk": {"title": "Desk"}}, "forecast_within": {"desk": {"measures": measures}}}
    found = rows(within_table(summary))
    assert list(found) == ["`sharp`", "`dull`", "`lone`"]
    assert found["`sharp`"] == {
        "measure before RL": "`sharp`",
        "Desk: over all starts": "0.60 [0.50, 0.70]",
        "n": "20",
        "within an arm": "0.20 [0.10, 0.30]",
        "pairs (arms)": "40 (3)",
    }
    assert found["`lone`"]["within an arm"] == found["`lone`"]["pairs (arms)"] == NONE


def test_table_of_a_real_model():
    measures = {
        "x": {
            "all": _area(0.7),
            "recipe": {**_area(0.8), "strata": 2, "pairs": 9},
            "arm": None,
        }
    }
    (row,) = rows(real_table({"measures": measures})).values()
    assert (row["within a recipe"], row["pairs (recipes)"], row["within an arm"]) == ("0.80", "9 (2)", NONE)
