from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch

from lightning_rejuv.attribution.selection import select_neurons, shares

SCORES = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (10, 30, 7, 13)]
LAYERS = [0, 0, 1, 1]
POOLS = {"model": [[0, 1, 2, 3]], "layer": [[0, 1], [2, 3]], "module": [[0], [1], [2], [3]]}
FRACTIONS = [0.001, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.77, 0.9, 1.0]


def _pairs(selected):
    return {(m, i) for m, index in enumerate(selected) for i in index.tolist()}


def _best(scores, members, count):
    ranked = sorted(
        ((float(scores[m][i]), m, i) for m in members for i in range(len(scores[m]))), reverse=True
    )
    return {(m, i) for score, m, i in ranked[:count] if score > 0}


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("scope", POOLS)
def test_the_best_of_each_pool_and_exactly_the_share_of_all(scope, fraction):
    selected = select_neurons(SCORES, LAYERS, fraction, scope=scope)
    total = round(fraction * 60)
    assert sum(map(len, selected)) == total
    expected = set()
    for members in POOLS[scope]:
        taken = sum(len(selected[m]) for m in members)
        quota = Fraction(total * sum(len(SCORES[m]) for m in members), 60)
        assert floor(quota) <= taken <= floor(quota) + (quota % 1 > 0)
        expected |= _best(SCORES, members, taken)
    assert _pairs(selected) == expected


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_largest_remainders(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 40, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
    sizes = sizes.tolist()
    for count in range(sum(sizes) + 1):
        got = shares(sizes, count)
        assert sum(got) == count
        quotas = [Fraction(count * size, sum(sizes)) for size in sizes]
        extra = [g - floor(q) for g, q in zip(got, quotas, strict=True)]
        assert set(extra) <= {0, 1}
        assert all(g <= size for g, size in zip(got, sizes, strict=True))
        rest = [q - floor(q) for q in quotas]
        given = [r for r, e in zip(rest, extra, strict=True) if e]
        kept = [r for r, e in zip(rest, extra, strict=True) if not e]
        assert not given or not kept or min(given) >= max(kept)


@pytest.mark.parametrize("scope", POOLS)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_a_neuron_without_a_positive_score_is_never_chosen_nor_replaced(scope, fraction):
    scores = [s - 0.6 for s in SCORES]
    scores[0][:4] = 0.0  # a tie with "does nothing"
    scores[2][:] = -1.0
    selected = select_neurons(scores, LAYERS, fraction, scope=scope)
    assert all((s[index] > 0).all() for s, index in zip(scores, selected, strict=True))
    total, sizes = round(fraction * 60), [sum(len(scores[m]) for m in members) for members in POOLS[scope]]
    expected = set()
    for members, count in zip(POOLS[scope], shares(sizes, total), strict=True):
        expected |= _best(scores, members, count)
    assert _pairs(selected) == expected
    assert len(expected) <= sum(int((s > 0).sum()) for s in scores)


def test_the_random_control_has_the_same_count_per_matrix_and_other_neurons():
    targeted = select_neurons(SCORES, LAYERS, 0.4)
    control = [
        select_neurons(SCORES, LAYERS, 0.4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert [len(t) for t in targeted] == [len(c) for c in control[0]]
    assert _pairs(control[0]) == _pairs(control[1]) != _pairs(control[2])
    assert _pairs(control[0]) != _pairs(targeted)
    assert all(len(set(c.tolist())) == len(c) for c in control[0])


def test_the_random_control_is_drawn_alike_whatever_the_default_device():
    scores, union = [torch.rand(40)], [torch.arange(40) < 10]

    def drawn():
        generator = torch.Generator().manual_seed(3)
        return select_neurons(scores, [0], 0.25, scope="model", union=union, generator=generator)[0]

    expected = drawn()
    with torch.device("meta"):
        assert drawn().tolist() == expected.tolist()


def test_nothing_is_selected_for_a_fraction_of_zero():
    assert [len(s) for s in select_neurons(SCORES, LAYERS, 0.0)] == [0, 0, 0, 0]
