"""Share of neurons that hardly receive a gradient (GraMa)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_choice, check_floating
from lightning_rejuv.functional.dormancy_scores import _dormancy_scores_compute
from lightning_rejuv.functional.dormant_fraction import _tau_check, dormant_fraction

Neurons = Literal["row", "column"]


def _gradient_dormancy_check(gradient: Tensor, neurons: str, tau: float) -> None:
    check_choice("neurons", neurons, ("row", "column"))
    check_floating("gradient", gradient, ndim=2)
    _tau_check(tau)


def _gradient_dormancy_update(gradient: Tensor, neurons: str) -> Tensor:
    """Σ|g| of each neuron, float64; the width is common to all of a layer and cancels."""
    return gradient.detach().abs().sum(dim=1 if neurons == "row" else 0, dtype=torch.float64)


def gradient_dormancy(gradient: Tensor, tau: float = 0.01, neurons: Neurons = "row") -> Tensor:
    r"""Fraction of neurons with ``mean_j |∂L/∂W_ij| / (1/N Σ_k mean_j |∂L/∂W_kj|) <= τ``.

    Liu et al. 2025 (arXiv 2505.24061), with the gradient of the *weights* that enter the neuron. It sees a
    silent unit under any activation function. It depends on the loss: name the loss with the figure.

    Args:
        gradient: ``[out, in]``, of a weight, any floating dtype; scaled gradients give the same figure.
        tau: the threshold, 0.01 in the paper.
        neurons: what a neuron is: a ``"row"`` (what writes into it), or a ``"column"`` (what it writes).

    Returns:
        float64 scalar in [0, 1]; 1 where the whole gradient is zero.

    Raises:
        TypeError: a gradient that is not floating.
        ValueError: not a matrix, an unknown ``neurons``, a negative τ.

    >>> gradient_dormancy(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    tensor(0.5000, dtype=torch.float64)
    """
    _gradient_dormancy_check(gradient, neurons, tau)
    return dormant_fraction(_dormancy_scores_compute(_gradient_dormancy_update(gradient, neurons)), tau)
