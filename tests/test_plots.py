from __future__ import annotations

import math
import sys

import pytest

from lightning_rejuv.plots import before_after, heat_map


def texts(axes):
    return [t.get_text() for t in axes.texts]


def test_heat_map_puts_every_value_at_its_layer_and_module():
    values = {
        "model.layers.10.mlp.down_proj.weight": 0.25,
        "model.layers.2.mlp.down_proj.weight": 0.5,
        "model.layers.2.self_attn.q_proj.bias": 0.125,
        "model.embed_tokens.weight": 0.75,
        "lm_head.weight": math.nan,
    }
    figure = heat_map(values, "active_fraction", "step 7")
    axes, bar = figure.axes
    rows = [t.get_text() for t in axes.get_yticklabels()]
    columns = [t.get_text() for t in axes.get_xticklabels()]
    assert rows == ["2", "10", "other"]  # by number, not by text
    assert columns == ["down", "q bias"]
    table = axes.images[0].get_array()
    assert table[rows.index("10"), columns.index("down")] == 0.25
    assert table[rows.index("2"), columns.index("q bias")] == 0.125
    assert table[rows.index("other"), 0] == 0.75
    assert table.mask.sum() == 6 - 4  # everything else is shown as empty, NaN among it
    assert sorted(texts(axes)) == ["0.12", "0.25", "0.5", "embed\n0.75", "lm_head\nNaN"]
    assert axes.get_title() == "active units\nstep 7"
    assert bar.get_ylabel() == "fraction"


def test_colour_scales_do_not_move_with_the_values():
    for low, high in ((0.001, 0.01), (0.1, 0.9)):
        figure = heat_map({"layers.0.a": low, "layers.1.a": high}, "relative_drift")
        assert figure.axes[0].images[0].get_clim() == (1e-4, 1.0)
    for value in (33.0, 60.0):
        figure = heat_map({"layers.0.a": value}, "effective_rank")
        assert figure.axes[0].images[0].get_clim() == (0.0, 64.0)


def test_before_after_shows_what_both_have():
    before = {"token_entropy": 0.02, "support_retention": -9.0, "relative_drift": 0.2, "srank": math.nan}
    after = {
        "token_entropy": 0.2,
        "support_retention": -1.0,
        "relative_drift": 0.1,
        "srank": 3.0,
        "effective_rank": 2.0,
    }
    figure = before_after(before, after, {"token_entropy": 0.3, "relative_drift": 0.0})
    assert [a.get_title() for a in figure.axes] == [
        "token entropy",
        "support retention",
        "drift from the base",
    ]
    entropy, _, drift = figure.axes
    assert [bar.get_height() for bar in entropy.patches] == [0.02, 0.2]
    assert entropy.lines[0].get_ydata()[0] == 0.3
    assert not drift.lines  # the base's drift from itself is no yardstick


def test_bad_input():
    with pytest.raises(ValueError, match="at least one value of 'srank'"):
        heat_map({}, "srank")
    with pytest.raises(ValueError, match=r"in both but got \['a'\] and \['b'\]"):
        before_after({"a": 1.0}, {"b": 1.0})


def test_pyplot_keeps_no_figure():
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")
    heat_map({"layers.0.a": 1.0}, "srank")
    assert matplotlib.pyplot.get_fignums() == []


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-rejuv\[plots\]"):
        heat_map({"layers.0.a": 1.0}, "srank")
