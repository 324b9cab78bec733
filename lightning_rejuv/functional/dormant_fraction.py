"""Share of a layer's neurons whose dormancy score is at most tau (ReDo)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_floating


def _tau_check(tau: float) -> None:
    if not isinstance(tau, (int, float)) or not 0.0 <= tau < float("inf"):
        raise ValueError(f"Expected argument `tau` to be a float >= 0 but got {tau!r}.")


def dormant_fraction(scores: Tensor, tau: float = 0.025) -> Tensor:
    r"""Fraction of neurons with ``s_i <= τ``, over all neurons of all layers given together.

    Sokar et al. 2023 (arXiv 2302.12902, definition 3.1), τ = 0.025 there. On SiLU, GELU and gated layers it
    is identically zero and says nothing: publish the scores' low quantiles beside it. Concatenate the layers'
    scores for the network's figure; a mean of the layers' fractions weights small layers too heavily.

    Args:
        scores: ``[N]``, :func:`dormancy_scores`.
        tau: the threshold; print it with every figure.

    Returns:
        float64 scalar in [0, 1]; NaN where there is no neuron, or a score is NaN.

    Raises:
        TypeError: scores that are not floating.
        ValueError: scores of another rank, or a negative τ.

    >>> dormant_fraction(torch.tensor([0.0, 0.01, 1.0, 3.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    check_floating("scores", scores, ndim=1)
    _tau_check(tau)
    dormant = torch.where(torch.isnan(scores), scores.double(), (scores <= tau).double())
    return dormant.mean()
