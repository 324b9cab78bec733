"""How weights are edited: a lerp toward the anchor, of a tensor or of some rows or columns; a shift."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_rejuv.ops import lerp
from lightning_rejuv.ops.blocked import one_thread
from lightning_rejuv.weights.rounding import HALF_TYPES, round_stochastically
from lightning_rejuv.weights.shard import Shard

if TYPE_CHECKING:
    from lightning_rejuv.neurons import NeuronGroup

# Where no kernel does it, tensors whose dtypes differ or that are rounded stochastically are lerped through float32 in
# pieces, so that no second copy of a large tensor is ever held; on a CPU in pieces that its cache holds.
_PIECE, _PIECE_ON_CPU = 1 << 24, 1 << 16

# Rounding is measured in one row of so many, in tensors with more than so many elements.
SAMPLED_ROWS, _SAMPLED = 8, 1 << 16


@torch.no_grad()
def lerp_(
    param: Tensor,
    base: Tensor,
    weight: float,
    *,
    dim: int = 0,
    index: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move a parameter toward its base in place: ``param + weight * (base - param)``.

    Computed in float32 or better and rounded once to the parameter's dtype. ``weight=0`` leaves every
    bit as it is; ``weight=1`` copies the base, bit for bit if the dtypes agree.

    Args:
        param: the parameter, any shape, floating point.
        base: tensor of the same shape, on any device and of any floating dtype; never changed.
        weight: the share of the base, 0 to 1.
        dim: with ``index``, the dimension that it counts along: 0 for rows, 1 for columns.
        index: 1-D int64; only these rows or columns are moved. None moves the whole tensor.
        generator: with one, a bfloat16 or float16 result is rounded stochastically: up or down with the
            probability that makes its expectation exact. Other dtypes are rounded to nearest.

    Returns:
        ``param``.

    Raises:
        ValueError: the shapes differ or the weight lies outside [0, 1].

    >>> w = torch.zeros(2, 2)
    >>> lerp_(w, torch.ones(2, 2), 1.0, dim=1, index=torch.tensor([0]))
    tensor([[1., 0.],
            [1., 0.]])
    """
    if param.shape != base.shape:
        raise ValueError(f"Expected `base` to have shape {tuple(param.shape)} but got {tuple(base.shape)}.")
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"Expected argument `weight` to lie in [0, 1] but got {weight}.")
    if weight == 0.0 or param.numel() == 0:
        return param
    if index is None:
        _lerp_whole(param, base, weight, generator)
    elif index.numel():
        at = index.to(param.device, non_blocking=True)
        rows = param.index_select(dim, at)
        _lerp_whole(rows, base.index_select(dim, index.to(base.device)), weight, generator)
        param.index_copy_(dim, at, rows)
    return param


def shift_(param: Tensor, move: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Move a parameter in place by what a training of it found: ``param + move``.

    Computed in float32 or better and rounded once to the parameter's dtype.

    Args:
        param: the parameter, any shape, floating point.
        move: tensor of the same shape, in float32 or better, on any device.
        generator: as in :func:`lerp_`.

    Returns:
        ``param``.

    Raises:
        ValueError: the shapes differ.

    >>> shift_(torch.ones(2), torch.tensor([0.5, -1.0]))
    tensor([1.5000, 0.0000])
    """
    if param.shape != move.shape:
        raise ValueError(f"Expected `move` to have shape {tuple(param.shape)} but got {tuple(move.shape)}.")
    exact = torch.promote_types(param.dtype, move.dtype)
    return lerp_(param, param.detach().to(exact) + move.to(param.device, exact), 1.0, generator=generator)


def _lerp_whole(param: Tensor, base: Tensor, weight: float, generator: torch.Generator | None) -> None:
    stochastic = generator is not None and param.dtype in HALF_TYPES
    if weight == 1.0 and (param.dtype == base.dtype or not stochastic):
        param.copy_(base)
    elif param.dtype == base.dtype and not stochastic:
        param.lerp_(base.to(param.device), weight)  # PyTorch computes half types in float32 here
    elif lerp.can_lerp(param, base):
        lerp.lerp_(param, base, weight, generator)
    else:
        exact = torch.promote_types(torch.promote_types(param.dtype, base.dtype), torch.float32)
        for piece, base_piece in _pieces(param, base):
            value = torch.lerp(piece.to(exact), base_piece.to(param.device, exact), weight)
            if stochastic and generator is not None:
                value = round_stochastically(value, param.dtype, generator)
            piece.copy_(value)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors of one shape piece by piece, so that no wide copy of a whole one is made.

    A piece is as many elements wherever memory has them in order, and as many rows as fit elsewhere: a multiple of four
    in either case, so that both draw the same random bits, of which four elements share a word. On a CPU one thread
    works on it.
    """
    first = tensors[0]
    size = _PIECE_ON_CPU if first.device.type == "cpu" else _PIECE
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    else:
        size = max(4, size // max(1, first[:1].numel()) // 4 * 4)
    with one_thread() if first.device.type == "cpu" else nullcontext():
        yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)


def rounding_sums(param: Tensor, base: Tensor, exact: Tensor, rounded: Tensor) -> Tensor:
    """Add up what rounding did to a fusion along the line from a parameter to its base.

    The first sum over the second is the shift of alpha, the weight that the parameter has in the fusion: how far from
    the exact fusion the rounded one lies along that line, in parts of the line. An SFT update of one unit in the last
    place, for instance, cannot be halved: to nearest every alpha below one half becomes 0 there. The length of the
    error would not tell that: stochastic rounding, which keeps alpha, makes the longer one.

    Args:
        param: the parameter before the fusion.
        base: the anchor's tensor, of the same shape.
        exact: the fusion before it was rounded.
        rounded: the fusion.

    Returns:
        ``[2]`` on the device: ⟨base - param, exact - rounded⟩ and ‖base - param‖².

    >>> w, b = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0078125]).bfloat16()  # the next one after 1
    >>> gap, line = rounding_sums(w, b, 0.4 * w.float() + 0.6 * b.float(), lerp_(w.clone(), b, 0.6))
    >>> round(float(gap / line), 3)
    -0.4
    """
    wide = torch.float32 if param.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    line = base.to(param.device, wide) - param.to(wide)
    error = exact.to(wide) - rounded.to(wide)
    return torch.stack([(line * error).sum(), (line * line).sum()])


@torch.no_grad()
def lerp_measuring_(
    param: Tensor, base: Tensor, weight: float, generator: torch.Generator | None = None
) -> Tensor:
    """Fuse a parameter as :func:`lerp_` does, and add up what rounding did to it; nothing waits for the device.

    Where no kernel does both in one read, every eighth row of a large parameter is looked at.

    Args:
        param: the parameter, fused in place.
        base: the anchor's tensor, of the same shape.
        weight: the share of the base.
        generator: of stochastic rounding.

    Returns:
        The numbers of :func:`rounding_sums`, ``[2, n]`` on the device, to be added up in float64; zeros if rounding
        does next to nothing: in float32 and wider, and if ``weight`` is 0 or 1.
    """
    if param.dtype.itemsize >= 4 or weight in (0.0, 1.0) or param.dim() == 0:
        lerp_(param, base, weight, generator=generator)
        return torch.zeros(2, 1, device=param.device)
    if lerp.can_lerp(param, base):
        return lerp.lerp_(param, base, weight, generator)
    step = SAMPLED_ROWS if param.numel() > _SAMPLED else 1
    before = param[::step].clone()
    lerp_(param, base, weight, generator=generator)
    sums = [torch.zeros(2, device=param.device)]
    for sft, anchor, rounded in _pieces(before, base[::step], param[::step]):
        exact = torch.lerp(sft.float(), anchor.to(sft.device, torch.float32), weight)
        sums.append(rounding_sums(sft, anchor, exact, rounded))
    return torch.stack(sums, 1)


def reset_neurons(
    shard: Shard,
    anchor: Tensor,
    group: NeuronGroup,
    dim: int,
    index: Tensor,
    omega: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Return neurons to the base: rows or columns of a weight, or entries of a bias.

    Args:
        shard: the part of the parameter that this process holds.
        anchor: the anchor's tensor, whole.
        group: whose neurons they are.
        dim: the dimension of ``group.matrix(parameter)`` that counts them.
        index: 1-D int64, which along ``dim``.
        omega: weight of the base on them.
        generator: of stochastic rounding.
    """
    piece = shard.expert(group.expert)
    if piece is not None:
        base, local = piece.of(group.matrix(anchor)), piece.local(index, dim)
        lerp_(piece.values, base, omega, dim=dim, index=local, generator=generator)
