"""The measures as pure functions: one formula a file, torch only, float32 or better inside."""

from lightning_rejuv.functional.active_fraction import active_fraction
from lightning_rejuv.functional.critical_pass_rate import critical_pass_rate
from lightning_rejuv.functional.dormancy_scores import dormancy_scores
from lightning_rejuv.functional.dormant_fraction import dormant_fraction
from lightning_rejuv.functional.drift_sparsity import drift_sparsity
from lightning_rejuv.functional.effective_rank import effective_rank
from lightning_rejuv.functional.entropy_gap import entropy_gap
from lightning_rejuv.functional.gradient_dormancy import gradient_dormancy
from lightning_rejuv.functional.pass_at_k import pass_at_k
from lightning_rejuv.functional.relative_drift import relative_drift
from lightning_rejuv.functional.response_mask import response_mask
from lightning_rejuv.functional.sam_gap import sam_gap
from lightning_rejuv.functional.sharpness import sharpness
from lightning_rejuv.functional.srank import srank
from lightning_rejuv.functional.stable_rank import stable_rank
from lightning_rejuv.functional.support_retention import support_retention
from lightning_rejuv.functional.token_entropy import token_entropy
from lightning_rejuv.functional.top1_confidence import top1_confidence
from lightning_rejuv.functional.update_ratio import update_ratio
from lightning_rejuv.functional.zero_variance_fraction import zero_variance_fraction
from lightning_rejuv.functional.zero_variance_probability import zero_variance_probability

__all__ = [
    "active_fraction",
    "critical_pass_rate",
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
    "zero_variance_probability",
]
