"""The measures as torchmetrics classes (state and sync, no formula), and what they say together."""

from lightning_rejuv.metrics.active_fraction import ActiveFraction
from lightning_rejuv.metrics.dormant_fraction import DormantFraction
from lightning_rejuv.metrics.drift_sparsity import DriftSparsity
from lightning_rejuv.metrics.effective_rank import EffectiveRank
from lightning_rejuv.metrics.entropy_gap import EntropyGap
from lightning_rejuv.metrics.gradient_dormancy import GradientDormancy
from lightning_rejuv.metrics.monitor import PlasticityMonitor
from lightning_rejuv.metrics.pass_at_k import PassAtK
from lightning_rejuv.metrics.relative_drift import RelativeDrift
from lightning_rejuv.metrics.sam_gap import SamGap
from lightning_rejuv.metrics.sharpness import Sharpness
from lightning_rejuv.metrics.srank import SRank
from lightning_rejuv.metrics.stable_rank import StableRank
from lightning_rejuv.metrics.support_retention import SupportRetention
from lightning_rejuv.metrics.token_entropy import TokenEntropy
from lightning_rejuv.metrics.top1_confidence import Top1Confidence
from lightning_rejuv.metrics.update_ratio import UpdateRatio
from lightning_rejuv.metrics.zero_variance_fraction import ZeroVarianceFraction
from lightning_rejuv.metrics.zero_variance_probability import ZeroVarianceProbability
from lightning_rejuv.verdict import Verdict, judge

__all__ = [
    "ActiveFraction",
    "DormantFraction",
    "DriftSparsity",
    "EffectiveRank",
    "EntropyGap",
    "GradientDormancy",
    "PassAtK",
    "PlasticityMonitor",
    "RelativeDrift",
    "SRank",
    "SamGap",
    "Sharpness",
    "StableRank",
    "SupportRetention",
    "TokenEntropy",
    "Top1Confidence",
    "UpdateRatio",
    "Verdict",
    "ZeroVarianceFraction",
    "ZeroVarianceProbability",
    "judge",
]
