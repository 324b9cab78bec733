"""The meaning of every fused statistic: float64, one tensor expression a quantity, no concern for speed.

Tests hold each back end to these functions; nothing at run time calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def activation_stats(h: Tensor, mask: Tensor | None = None, eps: float = 0.0) -> Tensor:
    r"""Statistics of each neuron over the kept tokens.

    .. math::
        \sum_t |h_{tn}|, \quad \sum_t h_{tn}, \quad \sum_t h_{tn}^2, \quad \max_t |h_{tn}|, \quad
        \#\{t : |h_{tn}| \le \epsilon\}, \quad \#\{t : h_{tn} > 0\}, \quad \#\{t\}

    Args:
        h: Activations ``[tokens, N]``.
        mask: Optional ``[tokens]``; tokens where it is zero are left out.
        eps: Threshold of "near zero", rounded to float32 unless ``h`` is float64.

    Returns:
        ``[7, N]`` float64 in the order of the formula. A maximum over no token is 0. A NaN among the kept
        tokens makes the first four of its neuron NaN and counts neither as near zero nor as positive.
    """
    threshold = eps if h.dtype == torch.float64 else torch.tensor(eps, dtype=torch.float32).item()
    x = h.double() if mask is None else h.double()[mask != 0]
    a = x.abs()
    largest = a.amax(0) if x.shape[0] else a.new_zeros(a.shape[1])
    tokens = torch.full_like(largest, x.shape[0])
    return torch.stack(
        [a.sum(0), x.sum(0), x.square().sum(0), largest, (a <= threshold).sum(0), (x > 0).sum(0), tokens]
    )


def grad_activation_stats(h: Tensor, grad: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Gradient × activation of each neuron, with g the gradient of the loss at h.

    .. math:: \sum_t |g_{tn} h_{tn}|, \quad \sum_t |g_{tn}|, \quad \sum_t g_{tn} h_{tn}, \quad \#\{t\}

    The first is the first-order Taylor attribution of Molchanov et al. (2017, arXiv 1611.06440, eq. 8) before
    its mean.

    Args:
        h: Activations ``[tokens, N]``.
        grad: Gradients ``[tokens, N]``.
        mask: Optional ``[tokens]``; tokens where it is zero are left out.

    Returns:
        ``[4, N]`` float64 in the order of the formula.
    """
    x, g = h.double(), grad.double()
    if mask is not None:
        x, g = x[mask != 0], g[mask != 0]
    product = x * g
    return torch.stack(
        [product.abs().sum(0), g.abs().sum(0), product.sum(0), torch.full_like(product.sum(0), x.shape[0])]
    )


def weight_drift(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    r"""Distance of a weight matrix from its base, for each row and for each column.

    .. math:: \|w - b\|_2^2, \quad \|w\|_2^2, \quad \|b\|_2^2, \quad \max |w - b|

    Args:
        weight: ``[R, C]``.
        base: ``[R, C]``.

    Returns:
        ``[4, R]`` of the rows and ``[4, C]`` of the columns, float64 in the order of the formula.
    """
    w, b = weight.double(), base.double()
    d = w - b
    rows, columns = (
        torch.stack([d.square().sum(dim), w.square().sum(dim), b.square().sum(dim), d.abs().amax(dim)])
        for dim in (1, 0)
    )
    return rows, columns


def token_stats(
    logits: Tensor, target: Tensor | None = None, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Confidence of each row's distribution :math:`p = \mathrm{softmax}(x / \tau)`, in nats.

    .. math::
        H = -\sum_v p_v \log p_v, \quad \log \sum_v e^{x_v / \tau}, \quad \log p_y, \quad \max_v p_v, \quad
        \arg\max_v p_v

    Args:
        logits: ``[rows, V]``. A logit of -inf has probability 0 and adds 0 to the entropy.
        target: Optional ``[rows]`` int64; the log-probability of a target outside ``[0, V)`` is NaN.
        temperature: :math:`\tau`, one for all rows or ``[rows]``.

    Returns:
        ``[4, rows]`` float64 in the order of the formula and ``[rows]`` int64, the lowest index among equals.
        A row that holds NaN or +inf, or nothing but -inf, has no distribution: its values are NaN and its
        index is -1.
    """
    x = logits.double()
    x = x / (temperature.double().unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
    logp = torch.log_softmax(x, 1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(1)
    chosen = torch.full_like(entropy, torch.nan)
    if target is not None:
        inside = (target >= 0) & (target < x.shape[1])
        picked = logp.gather(1, torch.where(inside, target, 0).unsqueeze(1)).squeeze(1)
        chosen = torch.where(inside, picked, chosen)
    defined = x.amax(1).isfinite()
    stats = torch.stack([entropy, torch.logsumexp(x, 1), chosen, p.amax(1)])
    return torch.where(defined, stats, torch.nan), torch.where(defined, x.argmax(1), -1)
