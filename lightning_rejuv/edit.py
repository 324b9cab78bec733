"""The one place where weights change: a lerp toward the anchor, of a tensor or of some rows or columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Tensors whose dtypes differ are lerped through float32 in pieces, so that no second copy of a large
# tensor is ever held.
_PIECE = 1 << 22


@torch.no_grad()
def lerp_(param: Tensor, base: Tensor, weight: float, *, dim: int = 0, index: Tensor | None = None) -> Tensor:
    """Move a parameter toward its base in place: ``param + weight * (base - param)``.

    Computed in float32 or better and rounded once to the parameter's dtype. ``weight=0`` leaves every
    bit as it is; ``weight=1`` copies the base, bit for bit where the dtypes agree.

    Args:
        param: the parameter, any shape, floating point.
        base: tensor of the same shape, on any device and of any floating dtype; never changed.
        weight: the share of the base, 0 to 1.
        dim: with ``index``, the dimension that it counts along: 0 for rows, 1 for columns.
        index: 1-D int64; only these rows or columns are moved. None moves the whole tensor.

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
        _lerp_whole(param, base, weight)
    elif index.numel():
        rows = param.index_select(dim, index.to(param.device))
        _lerp_whole(rows, base.index_select(dim, index.to(base.device)), weight)
        param.index_copy_(dim, index.to(param.device), rows)
    return param


def _lerp_whole(param: Tensor, base: Tensor, weight: float) -> None:
    if weight == 1.0:
        param.copy_(base)
    elif param.dtype == base.dtype:
        param.lerp_(base.to(param.device), weight)  # PyTorch computes half types in float32 here
    elif param.dim() > 1 and param.numel() > _PIECE:
        for piece, base_piece in zip(param, base, strict=True):
            _lerp_whole(piece, base_piece, weight)
    else:
        exact = torch.promote_types(torch.promote_types(param.dtype, base.dtype), torch.float32)
        param.copy_(torch.lerp(param.to(exact), base.to(param.device, exact), weight))


class Blend:
    """Puts other weights into a model for a while: the anchor's, or a fusion with it.

    A context manager. It holds one copy of the model's parameters, and on exit, also after an error,
    puts them back bit for bit.

    Args:
        model: the model.
        base_of: gives the anchor's tensor for a parameter's name.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> with Blend(net, lambda name: torch.zeros(1, 1)) as blend:
    ...     blend.at(0.25)
    ...     net.weight.item()
    0.25
    >>> net.weight.item()
    1.0
    """

    def __init__(self, model: nn.Module, base_of: Callable[[str], Tensor]) -> None:
        self._parameters = dict(model.named_parameters())
        self._base_of = base_of
        self._kept: dict[str, Tensor] = {}

    def __enter__(self) -> Blend:
        self._kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        return self

    @torch.no_grad()
    def at(self, alpha: float) -> None:
        """Put ``alpha * model + (1 - alpha) * anchor`` into the model."""
        for name, parameter in self._parameters.items():
            if alpha > 0:
                parameter.copy_(self._kept[name])
            lerp_(parameter, self._base_of(name), 1.0 - alpha)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._kept[name])
        self._kept = {}
