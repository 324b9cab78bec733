from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution.selection import select_neurons

SCORES = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (10, 30, 7, 13)]
LAYERS = [0, 0, 1, 1]


def _pairs(selected):
    return {(m, i) for m, index in enumerate(selected) for i in index.tolist()}


def _best(members, fraction):
    ranked = sorted(
        ((float(SCORES[m][i]), m, i) for m in members for i in range(len(SCORES[m]))), reverse=True
    )
    return {(m, i) for _, m, i in ranked[: max(1, round(fraction * len(ranked)))]}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_the_best_of_each_pool(fraction):
    pools = {"model": [[0, 1, 2, 3]], "layer": [[0, 1], [2, 3]], "module": [[0], [1], [2], [3]]}
    for scope, members in pools.items():
        expected = set().union(*(_best(m, fraction) for m in members))
        assert _pairs(select_neurons(SCORES, LAYERS, fraction, scope=scope)) == expected


def test_the_random_control_has_the_same_count_per_matrix_and_other_neurons():
    targeted = select_neurons(SCORES, LAYERS, 0.4)
    control = [
        select_neurons(SCORES, LAYERS, 0.4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert [len(t) for t in targeted] == [len(c) for c in control[0]]
    assert _pairs(control[0]) == _pairs(control[1]) != _pairs(control[2])
    assert _pairs(control[0]) != _pairs(targeted)
    assert all(len(set(c.tolist())) == len(c) for c in control[0])


def test_nothing_is_selected_for_a_fraction_of_zero():
    assert [len(s) for s in select_neurons(SCORES, LAYERS, 0.0)] == [0, 0, 0, 0]
