from __future__ import annotations

import pytest

from studies.analysis.forecast_tables import areas, turned_areas


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
