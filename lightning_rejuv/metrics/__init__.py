"""The measures as torchmetrics classes (state and sync, no formula), one domain a file, and what they say together."""

from lightning_rejuv.metrics.activations import ActiveFraction, DormantFraction, GradientDormancy
from lightning_rejuv.metrics.curvature import SamGap, Sharpness
from lightning_rejuv.metrics.monitor import PlasticityMonitor
from lightning_rejuv.metrics.rollouts import PassAtK, ZeroVarianceFraction
from lightning_rejuv.metrics.spectrum import EffectiveRank, SRank, StableRank
from lightning_rejuv.metrics.tokens import EntropyGap, SupportRetention, TokenEntropy, Top1Confidence
from lightning_rejuv.metrics.weights import DriftSparsity, RelativeDrift, UpdateRatio
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
    "judge",
]
