"""Which neurons are responsible for over-confidence: positions, contributions, selection."""

from lightning_rejuv.attribution.calibrated import Calibrated, calibrate
from lightning_rejuv.attribution.confidence import confidence, mean_entropy, nll_per_response
from lightning_rejuv.attribution.positions import POSITION_RULES, PositionRule
from lightning_rejuv.attribution.selection import RANKINGS, SCOPES, RankBy, Scope, select_neurons

__all__ = [
    "POSITION_RULES",
    "RANKINGS",
    "SCOPES",
    "Calibrated",
    "PositionRule",
    "RankBy",
    "Scope",
    "calibrate",
    "confidence",
    "mean_entropy",
    "nll_per_response",
    "select_neurons",
]
