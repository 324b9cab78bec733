"""How active each neuron is relative to its layer (ReDo)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_floating, check_mask, check_selects
from lightning_rejuv.ops import activation_stats


def _activations_check(activations: Tensor, mask: Tensor | None) -> None:
    check_floating("activations", activations)
    if activations.ndim < 2 or activations.shape[-1] == 0:
        raise ValueError(
            f"Expected argument `activations` to be of shape [..., N] but got {tuple(activations.shape)}."
        )
    check_mask(mask, activations.shape[:-1], "activations")


def _dormancy_scores_compute(abs_sum: Tensor) -> Tensor:
    """Scores [N] from each neuron's Σ|h|: the number of tokens is common to all and cancels."""
    mean = abs_sum.mean()
    return torch.where(mean == 0, 0.0, abs_sum / mean)


def dormancy_scores(activations: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Score of each neuron, ``s_i = E|h_i| / (1/N Σ_k E|h_k|)``, the mean over a layer being 1.

    Sokar et al. 2023 (arXiv 2302.12902, equation 1). The expectation runs over *all* leading dimensions:
    batch and positions. Smooth activations never come near zero: a closed SiLU unit scores 0.1 to 0.4 where
    a closed ReLU unit scores 0, so compare quantiles to the base's and not with a threshold.

    Args:
        activations: ``[..., N]``, any floating dtype, the neurons last (move channels there first).
        mask: ``[...]`` bool, the tokens to use: padding counts as silence.

    Returns:
        ``[N]`` float64, never negative; 0 throughout where the whole layer is silent.

    Raises:
        TypeError: activations that are not floating, a floating mask.
        ValueError: wrong rank, another shape of the mask, or no token selected.

    >>> dormancy_scores(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
    tensor([2., 0.], dtype=torch.float64)
    """
    _activations_check(activations, mask)
    stats = activation_stats(activations, mask)
    check_selects(mask, int(stats.tokens[0]))
    return _dormancy_scores_compute(stats.abs_sum)
