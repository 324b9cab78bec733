from __future__ import annotations

from studies.analysis.markdown import NONE
from studies.analysis.within_tables import real_table, within_findings, within_table
from tests.studies.analysis.made_up import rows


def _area(value, low=None, high=None):
    return {"n": 20, "value": value, "low": low, "high": high}


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
    text = within_findings(summary, best=1)
    assert text == (
        "- Desk, ROC-AUC over 40 pairs of a success and a failure of one arm (3 arms have both): "
        "`sharp` 0.20 [0.10, 0.30] (over all starts 0.60)."
    )
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
