"""From a score per neuron to the set of neurons that is reset."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

RankBy = Literal["absolute", "signed", "random"]
RANKINGS: tuple[str, ...] = get_args(RankBy)
Scope = Literal["model", "layer", "module"]
SCOPES: tuple[str, ...] = get_args(Scope)


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

    Args:
        scores: one 1-D tensor for each weight matrix, a score per neuron.
        layers: the decoder layer of each matrix.
        fraction: share of the neurons, 0 to 1; the count is rounded, at least one within each pool.
        scope: the pool that the neurons compete in: the whole model, their layer, or their own matrix.
        union: for each matrix a bool per neuron; with it they are what is selected, however many they are:
            the paper's rule.
        generator: with one, the *control*: the same count per matrix as the scores would give, drawn at
            random.

    Returns:
        For each matrix the sorted int64 indices of its selected neurons.

    >>> select_neurons([torch.tensor([1.0, 9.0]), torch.tensor([8.0, 0.0])], [0, 1], 0.5)
    [tensor([1]), tensor([0])]
    """
    if fraction == 0 or not scores:
        return [torch.empty(0, dtype=torch.int64) for _ in scores]
    pools: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        pools.setdefault({"model": 0, "layer": layer, "module": number}[scope], []).append(number)
    chosen: dict[int, Tensor] = {}
    if union is not None:
        pools = {}
        chosen = {number: mask.cpu().nonzero().flatten() for number, mask in enumerate(union)}
    for members in pools.values():
        joined = torch.cat([scores[m].detach().double().cpu() for m in members])
        best = joined.topk(max(1, round(fraction * len(joined))))
        top = torch.zeros(len(joined), dtype=torch.bool)
        top[best.indices[best.values > 0]] = True
        for member, mask in zip(members, top.split([len(scores[m]) for m in members]), strict=True):
            chosen[member] = mask.nonzero().flatten()
    if generator is not None:
        return [_draw(len(s), len(chosen[i]), generator) for i, s in enumerate(scores)]
    return [chosen[i] for i in range(len(scores))]


def _draw(total: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(total, generator=generator)[:count].sort().values
