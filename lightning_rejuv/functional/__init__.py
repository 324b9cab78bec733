"""The measures as pure functions: one domain a file, torch only, float32 or better inside."""

from lightning_rejuv.functional.activations import (
    active_fraction,
    dormancy_scores,
    dormant_fraction,
    gradient_dormancy,
)
from lightning_rejuv.functional.curvature import sam_gap, sharpness
from lightning_rejuv.functional.rollouts import (
    pass_at_k,
    zero_variance_fraction,
)
from lightning_rejuv.functional.spectrum import effective_rank, srank, stable_rank
from lightning_rejuv.functional.tokens import (
    entropy_gap,
    response_mask,
    support_retention,
    token_entropy,
    top1_confidence,
)
from lightning_rejuv.functional.weights import drift_sparsity, relative_drift, update_ratio

__all__ = [
    "active_fraction",
    "dormancy_scores",
    "dormant_fraction",
    "drift_sparsity",
    "effective_rank",
    "entropy_gap",
    "gradient_dormancy",
    "pass_at_k",
    "relative_drift",
    "response_mask",
    "sam_gap",
    "sharpness",
    "srank",
    "stable_rank",
    "support_retention",
    "token_entropy",
    "top1_confidence",
    "update_ratio",
    "zero_variance_fraction",
]
