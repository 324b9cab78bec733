"""Which neurons are responsible for over-confidence: positions, contributions, selection."""

from lightning_rejuv.attribution.attribution import Attribution
from lightning_rejuv.attribution.comparison import Comparison, compare
from lightning_rejuv.attribution.confidence import (
    Confidence,
    confidence,
    mean_entropy,
    mean_nll,
    nll_per_response,
)
from lightning_rejuv.attribution.demonstrated_format import format_probability
from lightning_rejuv.attribution.entropy_gradient import Loss, attribute_entropy, attribute_loss
from lightning_rejuv.attribution.selection import select_neurons
from lightning_rejuv.attribution.target_logit import attribute, check_reconstruction

__all__ = [
    "Attribution",
    "Comparison",
    "Confidence",
    "Loss",
    "attribute",
    "attribute_entropy",
    "attribute_loss",
    "check_reconstruction",
    "compare",
    "confidence",
    "format_probability",
    "mean_entropy",
    "mean_nll",
    "nll_per_response",
    "select_neurons",
]
