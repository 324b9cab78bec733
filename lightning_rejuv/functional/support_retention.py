"""How likely a model still finds what the base would say."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_floating, check_same_shape


def _support_retention_check(logprobs: Tensor, base_logprobs: Tensor, mask: Tensor | None) -> None:
    check_floating("logprobs", logprobs, ndim=2)
    check_floating("base_logprobs", base_logprobs, ndim=2)
    check_same_shape("logprobs", logprobs, "base_logprobs", base_logprobs)
    if mask is not None and mask.shape != logprobs.shape:
        raise ValueError(
            f"Expected argument `mask` to have the shape {tuple(logprobs.shape)} but got {tuple(mask.shape)}."
        )


def _support_retention_update(
    logprobs: Tensor, base_logprobs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum over responses of their log-likelihood ratio, float64, and the number of responses."""
    ratio = logprobs.detach().double() - base_logprobs.detach().double()
    if mask is None:
        return ratio.sum(), torch.full((), ratio.shape[0], device=ratio.device)
    keep = mask.to(torch.bool)
    return torch.where(keep, ratio, 0.0).sum(), keep.any(dim=1).sum()


def support_retention(logprobs: Tensor, base_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean log-likelihood ratio on the base's own responses, ``E_y[ln p(y) - ln p_base(y)]``.

    With responses y sampled from the base it is ``-KL(p_base ‖ p)``: 0 where nothing is lost, and the more
    negative the fewer of the base's ways are left for RL to find. Sample held-out prompts and keep what is
    verified as correct, where that can be. On SFT demonstrations it means something else: there it rises.

    Args:
        logprobs: ``[B, T]``, the model's log-probabilities of the responses' tokens.
        base_logprobs: ``[B, T]``, the base's.
        mask: ``[B, T]`` bool, the responses' tokens; all by default. A row without any is left out.

    Returns:
        float64 scalar, nats per response.

    Raises:
        TypeError: not floating.
        ValueError: wrong rank, differing shapes, no token selected, or NaN.

    >>> support_retention(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-1.0, -1.0]]))
    tensor(-2., dtype=torch.float64)
    """
    _support_retention_check(logprobs, base_logprobs, mask)
    total, count = _support_retention_update(logprobs, base_logprobs, mask)
    if int(count) == 0:
        raise ValueError("Expected at least one response token to measure but the mask selects none.")
    if bool(torch.isnan(total)):
        raise ValueError("Expected log-probabilities that are not NaN at the selected tokens but got NaN.")
    return total / count
