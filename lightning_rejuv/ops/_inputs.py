"""What every fused statistic checks before it reads: plain tensors, matching shapes, rows without a copy."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def check_plain(**tensors: Tensor | None) -> None:
    """Refuse sharded tensors: a statistic of one shard is not the statistic of the whole.

    Raises:
        TypeError: If a tensor is a ``DTensor``, naming the argument and the way out.
    """
    for name, tensor in tensors.items():
        # torch.distributed.tensor is not imported: callers who never shard need not wait for it.
        if tensor is not None and type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"Expected argument `{name}` to be a plain tensor but got a DTensor. Pass "
                f"`{name}.to_local()` and merge the ranks' results: sums add, maxima take the maximum "
                "(see `merge_activation_stats`, `merge_token_stats`)."
            )


def check_floating(**tensors: Tensor | None) -> None:
    """Require floating point tensors of at least one dimension.

    Raises:
        TypeError: If a tensor is not of a floating point dtype.
        ValueError: If a tensor has no dimension.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(
                f"Expected argument `{name}` to be a floating point tensor but got {tensor.dtype}."
            )
        if tensor.dim() == 0:
            raise ValueError(f"Expected argument `{name}` to have at least one dimension but got a scalar.")


def check_device(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Require two tensors on one device: a kernel reads the other's address without asking.

    Raises:
        ValueError: If the devices differ.
    """
    if tensor.device != reference.device:
        raise ValueError(
            f"Expected argument `{name}` on the device of `{reference_name}` ({reference.device}) but got "
            f"{tensor.device}."
        )


def check_leading(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Require one entry of ``tensor`` for each row of ``reference``.

    Raises:
        ValueError: If ``tensor.shape`` is not ``reference.shape[:-1]`` or the devices differ.
    """
    expected = tuple(reference.shape[:-1])
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"Expected argument `{name}` to have shape {expected}, one entry for each row of "
            f"`{reference_name}`, but got {tuple(tensor.shape)}."
        )
    check_device(name, tensor, reference_name, reference)


def _flattens(tensor: Tensor) -> bool:
    """Whether a view can merge all dimensions but the last."""
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(kept))


def matrices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """View tensors of one shape ``[..., N]`` as matrices ``[rows, N]``, in order and never by a copy.

    The result is one tuple of matrices if all strides allow it, otherwise one for each index of the leading
    dimensions that do not merge: ``logits[:, :-1]`` of several sequences comes as one matrix a sequence.
    """
    if tensors[0].dim() == 1:
        return [tuple(tensor.unsqueeze(0) for tensor in tensors)]
    if tensors[0].dim() == 2:
        return [tensors]
    if all(_flattens(tensor) for tensor in tensors):
        return [tuple(tensor.view(-1, tensor.shape[-1]) for tensor in tensors)]
    slices = zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
    return [matrix for parts in slices for matrix in matrices(*parts)]


def split_rows(values: Tensor | None, parts: list[tuple[Tensor, ...]]) -> list[Tensor | None]:
    """Split one value a row, ``[...]``, into contiguous vectors that match the matrices of `matrices`."""
    if values is None:
        return [None] * len(parts)
    flat = values.contiguous().view(-1)
    return [flat] if len(parts) == 1 else list(flat.split([part[0].shape[0] for part in parts]))


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that have no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
