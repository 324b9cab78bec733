"""From a score per neuron to the set of neurons that is reset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rejuv.config import Scope


def select_neurons(
    scores: list[Tensor],
    layers: list[int],
    fraction: float,
    *,
    scope: Scope = "model",
    union: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Take a fixed share of all neurons, those with the highest scores; only positive scores count.

    The share is of all neurons, rounded once. Where they compete in several pools it is handed out to the pools
    in proportion to their sizes, by largest remainders, so that the total is exact; a pool may get none. If
    fewer neurons of a pool have a positive score, fewer are taken, and none of another pool in their place.

    Args:
        scores: one 1-D tensor for each weight matrix, a score per neuron.
        layers: the decoder layer of each matrix.
        fraction: share of the neurons, 0 to 1; see :func:`count_of`.
        scope: the pool that the neurons compete in: the whole model, their layer, or their own matrix.
        union: for each matrix a bool per neuron. If it is given, these neurons are selected, however many they are:
            the paper's rule.
        generator: if it is given, as many neurons of each matrix as otherwise are drawn at random: the *control*.

    Returns:
        For each matrix the sorted int64 indices of its selected neurons.

    >>> select_neurons([torch.tensor([1.0, 9.0]), torch.tensor([8.0, 0.0])], [0, 1], 0.5)
    [tensor([1]), tensor([0])]
    """
    if fraction == 0 or not scores:
        return [torch.empty(0, dtype=torch.int64) for _ in scores]
    if union is not None:
        chosen = {number: mask.cpu().nonzero().flatten() for number, mask in enumerate(union)}
    else:
        chosen = _best_of_pools(scores, layers, fraction, scope)
    if generator is not None:
        return [_draw(len(s), len(chosen[i]), generator) for i, s in enumerate(scores)]
    return [chosen[i] for i in range(len(scores))]


def count_of(fraction: float, total: int) -> int:
    """Return how many neurons a share of them is, rounded.

    >>> count_of(0.02, 1568), count_of(0.02, 20)
    (31, 0)
    """
    return round(fraction * total)


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """Hand out a count to pools in proportion to their sizes, by largest remainders.

    Args:
        sizes: the size of each pool.
        count: at most the sum of the sizes. Of pools with equal remainders the first ones get the rest.

    >>> shares([30, 10, 10], 6), shares([4, 4, 4], 2)
    ([4, 1, 1], [1, 1, 0])
    """
    total = sum(sizes)
    whole = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda pool: -(count * sizes[pool] % total))
    for pool in by_remainder[: count - sum(whole)]:
        whole[pool] += 1
    return whole


def _best_of_pools(
    scores: list[Tensor], layers: list[int], fraction: float, scope: Scope
) -> dict[int, Tensor]:
    pools: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        pools.setdefault({"model": 0, "layer": layer, "module": number}[scope], []).append(number)
    sizes = [sum(len(scores[m]) for m in members) for members in pools.values()]
    chosen: dict[int, Tensor] = {}
    for members, count in zip(pools.values(), shares(sizes, count_of(fraction, sum(sizes))), strict=True):
        joined = torch.cat([scores[m].detach().double().cpu() for m in members])
        best = joined.topk(count)
        top = torch.zeros(len(joined), dtype=torch.bool)
        top[best.indices[best.values > 0]] = True
        for member, mask in zip(members, top.split([len(scores[m]) for m in members]), strict=True):
            chosen[member] = mask.nonzero().flatten()
    return chosen


def _draw(total: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(total, generator=generator, device="cpu")[:count].sort().values
