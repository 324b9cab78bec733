"""The measures as torchmetrics classes: state and sync, no formula."""

from lightning_rejuv.metrics.entropy_gap import EntropyGap
from lightning_rejuv.metrics.monitor import PlasticityMonitor
from lightning_rejuv.metrics.pass_at_k import PassAtK
from lightning_rejuv.metrics.relative_drift import RelativeDrift
from lightning_rejuv.metrics.token_entropy import TokenEntropy
from lightning_rejuv.metrics.top1_confidence import Top1Confidence
from lightning_rejuv.metrics.zero_variance_fraction import ZeroVarianceFraction

__all__ = [
    "EntropyGap",
    "PassAtK",
    "PlasticityMonitor",
    "RelativeDrift",
    "TokenEntropy",
    "Top1Confidence",
    "ZeroVarianceFraction",
]
