"""Every metric with batches of unequal size and its functional twin on their union."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rejuv import functional as F
from lightning_rejuv import metrics as M


class Case(NamedTuple):
    """A metric, its updates, and what it must come to."""

    make: Callable[[], Any]
    batches: list[tuple[Any, ...]]
    whole: Callable[[], Tensor]


def cases(seed: int = 0) -> dict[str, Case]:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    rows = (2, 5, 1, 4)
    logits = [randn(n, 6, 13) * 3 for n in rows]
    base = [randn(n, 6, 13) for n in rows]
    masks = [torch.rand(n, 6, generator=g) < 0.6 for n in rows]
    masks[2][:] = False  # a batch that is all padding
    features = [randn(n, 6, 5) for n in rows]
    hidden = [randn(n, 6, 7).relu() for n in rows]
    rewards = [(torch.rand(n, 8, generator=g) < 0.3).float() for n in rows]
    weights = [(randn(n, 9), randn(n, 9)) for n in rows]
    gradients = [randn(6, 9) * torch.logspace(-4, 0, 6)[:, None] for _ in rows]

    def cat(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)

    old = [b for _, b in weights]
    new = [w for w, _ in weights]
    token = {"mask": cat(masks)}
    pairs = list(zip(logits, masks, strict=True))
    found = {
        "TokenEntropy": Case(
            lambda: M.TokenEntropy(0.7), pairs, lambda: F.token_entropy(cat(logits), temperature=0.7, **token)
        ),
        "Top1Confidence": Case(
            lambda: M.Top1Confidence(0.7),
            pairs,
            lambda: F.top1_confidence(cat(logits), temperature=0.7, **token),
        ),
        "EntropyGap": Case(
            lambda: M.EntropyGap(0.7),
            list(zip(logits, base, masks, strict=True)),
            lambda: F.entropy_gap(cat(logits), cat(base), temperature=0.7, **token),
        ),
        "SupportRetention": Case(
            M.SupportRetention,
            [(x[..., 0], y[..., 0], m) for x, y, m in zip(logits, base, masks, strict=True)],
            lambda: F.support_retention(cat(logits)[..., 0], cat(base)[..., 0], **token),
        ),
        "EffectiveRank": Case(
            lambda: M.EffectiveRank(5, center=True),
            list(zip(features, masks, strict=True)),
            lambda: F.effective_rank(cat(features), center=True, **token),
        ),
        "StableRank": Case(
            lambda: M.StableRank(5),
            list(zip(features, masks, strict=True)),
            lambda: F.stable_rank(cat(features), **token),
        ),
        "SRank": Case(
            lambda: M.SRank(5, delta=0.2),
            list(zip(features, masks, strict=True)),
            lambda: F.srank(cat(features), 0.2, **token),
        ),
        "DormantFraction": Case(
            lambda: M.DormantFraction(7, tau=0.95),
            list(zip(hidden, masks, strict=True)),
            lambda: F.dormant_fraction(F.dormancy_scores(cat(hidden), **token), 0.95),
        ),
        "ActiveFraction": Case(
            lambda: M.ActiveFraction(7, threshold=0.3),
            list(zip(hidden, masks, strict=True)),
            lambda: F.active_fraction(cat(hidden), threshold=0.3, **token),
        ),
        "GradientDormancy": Case(
            lambda: M.GradientDormancy(6, tau=0.1),
            [(x,) for x in gradients],
            lambda: F.gradient_dormancy(torch.cat(gradients, 1), tau=0.1),
        ),
        "RelativeDrift": Case(M.RelativeDrift, weights, lambda: F.relative_drift(cat(new), cat(old))),
        "DriftSparsity": Case(
            lambda: M.DriftSparsity(0.5), weights, lambda: F.drift_sparsity(cat(new), cat(old), 0.5)
        ),
        "UpdateRatio": Case(M.UpdateRatio, weights, lambda: F.update_ratio(cat(new), cat(old))),
        "PassAtK": Case(
            lambda: M.PassAtK(3),
            [(x,) for x in rewards],
            lambda: F.pass_at_k(8, cat(rewards).sum(1).long(), 3).mean(),
        ),
        "ZeroVarianceFraction": Case(
            M.ZeroVarianceFraction, [(x,) for x in rewards], lambda: F.zero_variance_fraction(cat(rewards))
        ),
    }
    x = [randn(4, 4).requires_grad_() for _ in rows]
    losses = [lambda w=w: (w.square() * torch.arange(1.0, 5)).sum() ** 2 for w in x]
    updates = [(loss, [w]) for loss, w in zip(losses, x, strict=True)]
    found["Sharpness"] = Case(
        lambda: M.Sharpness(iterations=30),
        updates,
        lambda: torch.stack([F.sharpness(f, p, 30) for f, p in updates]).mean(),
    )
    found["SamGap"] = Case(
        lambda: M.SamGap(0.1), updates, lambda: torch.stack([F.sam_gap(f, p, 0.1) for f, p in updates]).mean()
    )
    return found
