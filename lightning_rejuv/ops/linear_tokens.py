"""Token statistics from hidden states: float32 logits are made chunk by chunk, and each chunk is read once (op D)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.ops._inputs import check_device, check_floating, check_leading, check_plain
from lightning_rejuv.ops.tokens import TokenPartials, TokenStats, merge_token_stats, token_partials

#: How many vocabulary rows of the projection are converted to float32 at a time if no matmul can do it on the fly.
VOCAB_BLOCK = 8192


def _matmul_widens(hidden: Tensor, weight: Tensor) -> bool:
    """Whether one matmul reads 16-bit inputs and writes float32 (CUDA, torch ≥ 2.8)."""
    sixteen_bit = hidden.dtype == weight.dtype and hidden.dtype in (torch.float16, torch.bfloat16)
    return sixteen_bit and hidden.is_cuda and hasattr(torch.ops.aten.mm, "dtype")


def _chunk_partials(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor | None,
    vocab_start: int,
) -> list[TokenPartials]:
    if _matmul_widens(hidden, weight):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        if bias is not None:
            logits += bias
        return [token_partials(logits, target, temperature, vocab_start=vocab_start)]
    wide = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    hidden = hidden.to(wide)
    partials = []
    for start in range(0, weight.shape[0], VOCAB_BLOCK):
        logits = hidden @ weight[start : start + VOCAB_BLOCK].to(wide).t()
        if bias is not None:
            logits += bias[start : start + VOCAB_BLOCK]
        partials.append(token_partials(logits, target, temperature, vocab_start=vocab_start + start))
    return partials


def token_stats_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
) -> TokenStats:
    """Return `token_stats` of ``hidden @ weight.T + bias`` without ever holding all logits.

    The logits are float32 even for 16-bit inputs and under autocast: rounding them to bfloat16 alone moves
    the entropy of a peaked distribution by several per cent. float32 inputs follow
    ``torch.get_float32_matmul_precision``.

    Args:
        hidden: Last hidden states after the final norm, ``[..., H]``.
        weight: Output projection ``[V, H]``.
        target: Optional ``[...]`` int64.
        temperature: Positive, one for all tokens or ``[...]``. None means 1.
        bias: Optional ``[V]``.
        chunk_size: Tokens projected at a time. On CUDA a chunk holds ``chunk_size · V`` float32 logits;
            elsewhere it goes through the vocabulary 8192 entries at a time.

    Returns:
        Statistics of shape ``[...]``.

    Raises:
        TypeError: If an argument is of the wrong dtype, or a DTensor.
        ValueError: If shapes or devices do not fit, or ``chunk_size`` or a float ``temperature`` is not
            positive.

    Example:
        >>> import torch
        >>> from lightning_rejuv import ops
        >>> stats = ops.token_stats_from_hidden(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]))
        >>> [round(x, 4) for x in stats.entropy.tolist()]
        [1.3863, 1.3863]
    """
    row_temperature = temperature if isinstance(temperature, Tensor) else None
    check_plain(hidden=hidden, weight=weight, target=target, temperature=row_temperature, bias=bias)
    check_floating(hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"Expected argument `weight` to have shape [V, {hidden.shape[-1]}] to fit `hidden` "
            f"{tuple(hidden.shape)} but got {tuple(weight.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"Expected argument `bias` to have shape {(weight.shape[0],)} but got {tuple(bias.shape)}."
        )
    if chunk_size < 1:
        raise ValueError(f"Expected argument `chunk_size` to be a positive int but got {chunk_size}.")
    check_device("weight", weight, "hidden", hidden)
    if target is not None:
        check_leading("target", target, "hidden", hidden)
        target = target.reshape(-1)
    if row_temperature is not None:
        check_leading("temperature", row_temperature, "hidden", hidden)
        row_temperature = row_temperature.reshape(-1)
    leading = hidden.shape[:-1]
    flat, weight = hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach()
    chunks = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, max(1, flat.shape[0]), chunk_size):
            chunk = slice(start, start + chunk_size)
            tau = temperature if row_temperature is None else row_temperature[chunk]
            y = None if target is None else target[chunk]
            partials = _chunk_partials(flat[chunk], weight, y, bias, tau, vocab_start=0)
            chunks.append(merge_token_stats(partials, has_target=target is not None))
    columns = zip(*chunks, strict=True)
    return TokenStats(*(None if c[0] is None else torch.cat(c).view(leading) for c in columns))  # type: ignore[arg-type]
