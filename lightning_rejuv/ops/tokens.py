"""Entropy, log-probability and top-1 of every token's distribution, in one read of the logits (op D)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_rejuv.ops._inputs import (
    check_device,
    check_floating,
    check_leading,
    check_plain,
    matrices,
    split_rows,
)
from lightning_rejuv.ops._library import registered

if TYPE_CHECKING:
    from collections.abc import Sequence


class TokenStats(NamedTuple):
    """Confidence of each token's distribution, each ``[...]``; entropy and logarithms in nats."""

    entropy: Tensor
    logsumexp: Tensor
    logprob: Tensor | None
    top1_prob: Tensor
    top1_id: Tensor


class TokenPartials(NamedTuple):
    """What one shard of the vocabulary contributes to the statistics of each token, ready to be merged.

    With u = x/τ − max(x/τ), the rows of ``sums [4, tokens]`` are max(x/τ), Σeᵘ, Σu·eᵘ and the target's x/τ
    (NaN where the target is not in the shard). ``top1_id [tokens]`` counts from the start of the whole
    vocabulary.
    """

    sums: Tensor
    top1_id: Tensor


def token_partials(
    logits: Tensor,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    *,
    vocab_start: int = 0,
) -> TokenPartials:
    """Read a shard of the vocabulary once and return what `merge_token_stats` needs of it.

    Args:
        logits: ``[..., V]``, any floating point dtype and strides; columns ``vocab_start`` onwards of the
            vocabulary.
        target: Optional ``[...]`` int64, indices into the whole vocabulary.
        temperature: Positive, one for all tokens or ``[...]``; the logits are divided by it. None means 1.
            Entries of a tensor are not checked (that would wait for the device): a token whose entry is not
            positive gets NaN.
        vocab_start: First index of this shard.

    Returns:
        Partials over the flattened tokens, in float64 (float32 on devices without it).

    Raises:
        TypeError: If ``logits`` is not of a floating point dtype or a DTensor, or ``target`` is not int64.
        ValueError: If the vocabulary is empty, a shape or device does not fit, or a float temperature is not
            positive.
    """
    row_temperature = temperature if isinstance(temperature, Tensor) else None
    check_plain(logits=logits, target=target, temperature=row_temperature)
    check_floating(logits=logits)
    if logits.shape[-1] == 0:
        raise ValueError(
            f"Expected argument `logits` to have a vocabulary but got shape {tuple(logits.shape)}."
        )
    if target is not None:
        if target.dtype != torch.int64:
            raise TypeError(f"Expected argument `target` to be an int64 tensor but got {target.dtype}.")
        check_leading("target", target, "logits", logits)
    scale = 1.0
    if row_temperature is not None:
        check_leading("temperature", row_temperature, "logits", logits)
        row_temperature = row_temperature.detach().to(torch.float32)
    elif temperature is not None:
        scale = float(temperature)
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"Expected argument `temperature` to be a positive float but got {temperature}.")
    parts = matrices(logits.detach())
    results = [
        registered.token_partials.default(x, y, scale, tau, vocab_start)
        for (x,), y, tau in zip(
            parts, split_rows(target, parts), split_rows(row_temperature, parts), strict=True
        )
    ]
    if len(results) == 1:
        return TokenPartials(*results[0])
    return TokenPartials(torch.cat([r[0] for r in results], 1), torch.cat([r[1] for r in results]))


def merge_token_stats(partials: Sequence[TokenPartials], *, has_target: bool = True) -> TokenStats:
    """Merge the partials of all shards of the vocabulary, in any order.

    Under vocabulary parallelism: gather ``sums`` and ``top1_id`` of every rank (five numbers a token), then
    merge.

    Args:
        partials: One for each shard, over the same tokens.
        has_target: Whether the partials were made with a target; ``logprob`` is None without.

    Returns:
        Statistics ``[tokens]`` in float64 (float32 on devices without it) and int64. ``logprob`` is NaN where
        the target lies in no shard (-100, say). A row that holds NaN or +inf, or nothing but -inf, has no
        distribution: its values are NaN and its ``top1_id`` is -1. Among equal logits the lowest index is the top-1.

    Raises:
        ValueError: If there is no partial, or their shapes or devices differ.

    Example:
        >>> import torch
        >>> from lightning_rejuv import ops
        >>> logits, target = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([3])
        >>> shards = [ops.token_partials(logits[:, i : i + 2], target, vocab_start=i) for i in (0, 2)]
        >>> stats = ops.merge_token_stats(shards)
        >>> round(stats.entropy.item(), 4), round(stats.logprob.item(), 4), stats.top1_id.item()
        (1.3863, -1.3863, 0)
    """
    if not partials:
        raise ValueError("Expected argument `partials` to hold at least one shard but got none.")
    first = partials[0]
    for i, part in enumerate(partials):
        check_plain(sums=part.sums, top1_id=part.top1_id)
        if part.sums.shape != first.sums.shape or part.top1_id.shape != first.sums.shape[1:]:
            raise ValueError(
                "Expected argument `partials` to hold sums [4, tokens] and ids [tokens] of one shape, "
                f"{tuple(first.sums.shape)} in entry 0, but got {tuple(part.sums.shape)} and "
                f"{tuple(part.top1_id.shape)} in entry {i}."
            )
        check_device(f"partials[{i}]", part.sums, "partials[0]", first.sums)
    if len(partials) == 1:
        sums, ids = first.sums.unsqueeze(0), first.top1_id.unsqueeze(0)
    else:
        sums = torch.stack([part.sums for part in partials])
        ids = torch.stack([part.top1_id for part in partials])
    stats, top1_id = registered.merge_token_partials.default(sums, ids)
    entropy, logsumexp, logprob, top1_prob = stats.unbind(0)
    return TokenStats(entropy, logsumexp, logprob if has_target else None, top1_prob, top1_id)


def token_stats(
    logits: Tensor, target: Tensor | None = None, temperature: float | Tensor | None = None
) -> TokenStats:
    """Return entropy, logsumexp, the target's log-probability and the top-1 of every token.

    One read of the logits, no copy of them, no gradient. The formula is ``ops.reference.token_stats``; the
    entropy is taken as log Σeᵘ − Σu·eᵘ / Σeᵘ with u = x/τ − max, which keeps its digits on peaked
    distributions where logsumexp − Σp·x does not.

    Args:
        logits: ``[..., V]``, any floating point dtype, strides and vocabulary size.
        target: Optional ``[...]`` int64; ``logprob`` is NaN where it lies outside ``[0, V)`` (-100, say).
        temperature: Positive, one for all tokens or ``[...]``; the logits are divided by it. None means 1.

    Returns:
        Statistics of shape ``[...]`` as `merge_token_stats` describes them. ``logprob`` is None without a
        target.

    Raises:
        TypeError: As `token_partials`.
        ValueError: As `token_partials`.

    Example:
        >>> import torch
        >>> from lightning_rejuv import ops
        >>> stats = ops.token_stats(torch.tensor([[2.0, 2.0, -float("inf")]]), torch.tensor([1]))
        >>> round(stats.entropy.item(), 4), round(stats.logprob.item(), 4), stats.top1_prob.item()
        (0.6931, -0.6931, 0.5)
    """
    partials = token_partials(logits, target, temperature)
    stats = merge_token_stats([partials], has_target=target is not None)
    if logits.dim() == 2:
        return stats
    return TokenStats(*(None if x is None else x.view(logits.shape[:-1]) for x in stats))  # type: ignore[arg-type]
