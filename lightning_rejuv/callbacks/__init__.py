"""Lightning callbacks: when a model is measured, and when it is rejuvenated."""

from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.callbacks.rejuvenation import RejuvenationCallback

__all__ = ["PlasticityCallback", "RejuvenationCallback"]
