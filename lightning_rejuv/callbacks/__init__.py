"""Lightning callbacks: when a model is measured, and when it is rejuvenated."""

from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.callbacks.rejuvenation import RejuvenationCallback
from lightning_rejuv.callbacks.triggers import AtEnd, AtEpoch, AtStart, AtStep, Every, Trigger
from lightning_rejuv.callbacks.when_metric import WhenMetric

__all__ = [
    "AtEnd",
    "AtEpoch",
    "AtStart",
    "AtStep",
    "Every",
    "PlasticityCallback",
    "RejuvenationCallback",
    "Trigger",
    "WhenMetric",
]
