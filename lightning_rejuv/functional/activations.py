"""Measures of how active each neuron is, and of how much gradient it receives."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import (
    check_choice,
    check_floating,
    check_mask,
    check_not_negative,
    check_selects,
)
from lightning_rejuv.ops import activation_stats

Neurons = Literal["row", "column"]


def _activations_check(activations: Tensor, mask: Tensor | None) -> None:
    check_floating("activations", activations)
    if activations.ndim < 2 or activations.shape[-1] == 0:
        raise ValueError(
            f"Expected argument `activations` to be of shape [..., N] but got {tuple(activations.shape)}."
        )
    check_mask(mask, activations.shape[:-1], "activations")


def _dormancy_scores_compute(abs_sum: Tensor) -> Tensor:
    """Return the scores [N] from each neuron's Σ|h|: the number of tokens is common to all and cancels."""
    mean = abs_sum.mean()
    return torch.where(mean == 0, 0.0, abs_sum / mean)


def dormancy_scores(activations: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Score of each neuron, ``s_i = E|h_i| / (1/N Σ_k E|h_k|)``; the mean over a layer is 1.

    Sokar et al. 2023 (arXiv 2302.12902, equation 1). The expectation runs over *all* leading dimensions:
    batch and positions. Smooth activations never come near zero: a closed SiLU unit scores 0.1 to 0.4, a closed
    ReLU unit 0, so compare quantiles with the base's instead of using a threshold.

    Args:
        activations: ``[..., N]``, any floating dtype, the neurons last (move channels there first).
        mask: ``[...]`` bool, the tokens to use: padding counts as silence.

    Returns:
        ``[N]`` float64, never negative; 0 throughout if the whole layer is silent.

    Raises:
        TypeError: the activations are not floating, or the mask is.
        ValueError: the activations have too few dimensions, the mask has another shape or selects no token.

    >>> dormancy_scores(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
    tensor([2., 0.], dtype=torch.float64)
    """
    _activations_check(activations, mask)
    stats = activation_stats(activations, mask)
    check_selects(mask, int(stats.tokens[0]))
    return _dormancy_scores_compute(stats.abs_sum)


def dormant_fraction(scores: Tensor, tau: float = 0.025) -> Tensor:
    r"""Fraction of neurons with ``s_i <= τ``, over all neurons of all layers given together.

    Sokar et al. 2023 (arXiv 2302.12902, definition 3.1), who take τ = 0.025. On SiLU, GELU and gated layers it
    is identically zero and says nothing: publish the scores' low quantiles beside it. Concatenate the layers'
    scores for the network's figure; a mean of the layers' fractions weights small layers too heavily.

    Args:
        scores: ``[N]``, :func:`dormancy_scores`.
        tau: the threshold; print it with every figure.

    Returns:
        float64 scalar in [0, 1]; NaN if there is no neuron, or a score is NaN.

    Raises:
        TypeError: the scores are not floating.
        ValueError: the scores have another rank, or τ is negative.

    >>> dormant_fraction(torch.tensor([0.0, 0.01, 1.0, 3.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    check_floating("scores", scores, ndim=1)
    check_not_negative("tau", tau)
    dormant = torch.where(torch.isnan(scores), scores.double(), (scores <= tau).double())
    return dormant.mean()


def _active_fraction_compute(near_zero: Tensor, tokens: Tensor) -> Tensor:
    return 1.0 - near_zero.sum() / tokens.sum()


def active_fraction(activations: Tensor, mask: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    r"""Fraction of (token, neuron) pairs with ``|h| > threshold``.

    For ReLU at threshold 0 it is the fraction of active units of Ma et al. 2024 (arXiv 2310.07418). On
    smooth activations it is 1 at threshold 0; choose a threshold and compare with the base.

    Args:
        activations: ``[..., N]``, any floating dtype.
        mask: ``[...]`` bool, the tokens to use: counted padding would halve the figure at 50 % padding.
        threshold: the largest absolute value that counts as inactive.

    Returns:
        float64 scalar in [0, 1].

    Raises:
        TypeError: the activations are not floating, or the mask is.
        ValueError: the activations have too few dimensions, the mask has another shape or selects no token, or the
            threshold is negative.

    >>> active_fraction(torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
    tensor(0.5000, dtype=torch.float64)
    """
    _activations_check(activations, mask)
    check_not_negative("threshold", threshold)
    stats = activation_stats(activations, mask, eps=threshold)
    check_selects(mask, int(stats.tokens[0]))
    return _active_fraction_compute(stats.near_zero.to(torch.float64), stats.tokens)


def _gradient_dormancy_check(gradient: Tensor, neurons: str, tau: float) -> None:
    check_choice("neurons", neurons, ("row", "column"))
    check_floating("gradient", gradient, ndim=2)
    check_not_negative("tau", tau)


def _gradient_dormancy_update(gradient: Tensor, neurons: str) -> Tensor:
    """Return Σ|g| of each neuron, float64; the width is common to all of a layer and cancels."""
    return gradient.detach().abs().sum(dim=1 if neurons == "row" else 0, dtype=torch.float64)


def gradient_dormancy(gradient: Tensor, tau: float = 0.01, neurons: Neurons = "row") -> Tensor:
    r"""Fraction of neurons with ``mean_j |∂L/∂W_ij| / (1/N Σ_k mean_j |∂L/∂W_kj|) <= τ``.

    GraMa, Liu et al. 2025 (arXiv 2505.24061), with the gradient of the *weights* that enter the neuron. It sees a
    silent unit under any activation function. It depends on the loss: name the loss with the figure.

    Args:
        gradient: ``[out, in]``, of a weight, any floating dtype; scaled gradients give the same figure.
        tau: the threshold, 0.01 in the paper.
        neurons: what a neuron is: a ``"row"`` (what writes into it), or a ``"column"`` (what it writes).

    Returns:
        float64 scalar in [0, 1]; 1 if the whole gradient is zero.

    Raises:
        TypeError: the gradient is not floating.
        ValueError: it is no matrix, ``neurons`` is unknown, or τ is negative.

    >>> gradient_dormancy(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    tensor(0.5000, dtype=torch.float64)
    """
    _gradient_dormancy_check(gradient, neurons, tau)
    return dormant_fraction(_dormancy_scores_compute(_gradient_dormancy_update(gradient, neurons)), tau)
