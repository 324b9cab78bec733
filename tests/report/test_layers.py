"""Where neurons were reset: every one of them is in the line and in the table, on models of any depth."""

from __future__ import annotations

import re

import pytest

from lightning_rejuv.report.layers import by_layer, places_of, table

KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def _counts(layers, number):
    return {layer: {kind: number(layer, kind) for kind in KINDS} for layer in range(layers)}


@pytest.mark.parametrize("layers", [1, 2, 10, 11, 30, 80, 126])
def test_the_table_holds_every_neuron_in_a_screen(layers):
    counts = _counts(layers, lambda layer, kind: (7 * layer + len(kind)) % 5)
    rows = list(table(counts))
    assert len(rows) <= 11
    assert all(len(f"  {title:<17}{text}") <= 80 for title, text in rows)
    assert rows[0][1].split() == list(KINDS)
    last = -1
    for title, text in rows[1:]:
        first, _, stop = title.partition("-")
        assert int(first) == last + 1
        last = int(stop or first)
        found = [0 if number == "." else int(number) for number in text.split()]
        assert found == [sum(counts[n][kind] for n in range(int(first), last + 1)) for kind in KINDS]
    assert last == layers - 1


def test_the_line_names_the_fewest_layers_that_hold_nine_tenths():
    counts = _counts(30, lambda layer, kind: {"down": 20, "v": 8, "up": 2}.get(kind, 0) * (13 <= layer <= 21))
    assert places_of(counts) == "all in layers 13-21 of 30; down (180), v (72), up (18)"
    counts[2]["q"] = 20
    counts[28]["k"] = 5
    assert places_of(counts) == "92 % in layers 13-21 of 30; mostly down (180), v (72), q (20)"
    for start in range(30):  # by brute force: no shorter run of layers holds as much
        held = sum(sum(counts[n].values()) for n in range(start, min(30, start + 8)))
        assert held < 0.9 * 295


def test_one_layer_has_no_range():
    counts = by_layer([(0, "v", 0), (1, "v", 3), (2, "v", 0)])
    assert places_of(counts) == "all in layer 1 of 3; v (3)"
    assert re.sub(r"\s+", " ", " ".join(text for _, text in table(counts))).strip() == "v . 3 ."


def test_experts_of_a_layer_are_added_up():
    assert by_layer([(3, "up", 2), (3, "up", 5), (4, "up", 0)]) == {3: {"up": 7}, 4: {"up": 0}}


def test_of_neighbouring_layers_as_few_those_that_hold_more_are_named_and_else_the_first():
    def named(*numbers):
        return places_of({layer: {"v": number} for layer, number in enumerate(numbers)})

    assert named(1, 17, 2) == "95 % in layers 1-2 of 3; v (20)"
    assert named(2, 17, 1) == "95 % in layers 0-1 of 3; v (20)"
    assert named(3, 34, 3) == "92 % in layers 0-1 of 3; v (40)"
