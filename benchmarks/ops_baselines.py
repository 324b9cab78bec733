"""What people write instead of the fused statistics, for comparison. Each returns what the fused op returns."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 0.01


def activation_careless(h: Tensor) -> tuple[Tensor, ...]:
    """Cast, then one reduction a statistic: every line reads and writes a float32 copy."""
    x = h.float()
    a = x.abs()
    return a.sum(0), x.sum(0), (x * x).sum(0), a.amax(0), (a <= EPS).sum(0), (x > 0).sum(0)


def activation_careful(h: Tensor) -> tuple[Tensor, ...]:
    """Reductions that widen on the fly: one read a statistic, temporaries for the counts alone."""
    norm, wide = torch.linalg.vector_norm, torch.float32
    return (
        norm(h, 1, 0, dtype=wide),
        h.sum(0, dtype=wide),
        norm(h, 2, 0, dtype=wide).square(),
        norm(h, float("inf"), 0),
        (h.abs() <= EPS).sum(0),
        (h > 0).sum(0),
    )


def grad_activation_careless(h: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Cast both, multiply, reduce."""
    product = h.float() * g.float()
    return product.abs().sum(0), g.float().abs().sum(0), product.sum(0)


def drift_careless(w: Tensor, b: Tensor) -> list[Tensor]:
    """Cast both, subtract, reduce along both dimensions."""
    w, b = w.float(), b.float()
    d = w - b
    return [
        statistic
        for dim in (1, 0)
        for statistic in ((d * d).sum(dim), (w * w).sum(dim), (b * b).sum(dim), d.abs().amax(dim))
    ]


def drift_careful(w: Tensor, b: Tensor) -> list[Tensor]:
    """Norms that widen on the fly; the difference is still materialised."""
    norm, wide = torch.linalg.vector_norm, torch.float32
    d = w.float() - b.float()
    return [
        statistic
        for dim in (1, 0)
        for statistic in (
            norm(d, 2, dim).square(),
            norm(w, 2, dim, dtype=wide).square(),
            norm(b, 2, dim, dtype=wide).square(),
            norm(d, float("inf"), dim),
        )
    ]


def tokens_careless(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The textbook: log_softmax, exp, and a reduction each."""
    logp = torch.log_softmax(x.float(), -1)
    p = logp.exp()
    chosen = logp.gather(1, y.unsqueeze(1)).squeeze(1)
    return -(p * logp).sum(-1), torch.logsumexp(x.float(), -1), chosen, p.amax(-1), p.argmax(-1)


def tokens_careful(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """One exponential, shifted by the maximum."""
    x = x.float()
    top, top_id = x.max(-1)
    u = x - top.unsqueeze(1)
    e = u.exp()
    total = e.sum(-1)
    log_total = total.log()
    chosen = x.gather(1, y.unsqueeze(1)).squeeze(1) - top - log_total
    return log_total - (u * e).sum(-1) / total, top + log_total, chosen, 1 / total, top_id


def tokens_in_trainers(x: Tensor, y: Tensor, rows: int = 128) -> tuple[Tensor, Tensor]:
    """What RL trainers do: chunked log_softmax in the logits' own dtype, and a second pass for the target."""
    entropy = [-(logp.exp() * logp).sum(-1) for logp in (torch.log_softmax(c, -1) for c in x.split(rows))]
    chosen = [
        torch.log_softmax(c, -1).gather(1, t.unsqueeze(1)).squeeze(1)
        for c, t in zip(x.split(rows), y.split(rows), strict=True)
    ]
    return torch.cat(entropy), torch.cat(chosen)
