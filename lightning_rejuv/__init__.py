"""Restore the plasticity of an over-trained language model between SFT and RL."""

from lightning_rejuv.anchor import Anchor
from lightning_rejuv.callbacks import PlasticityCallback, RejuvenationCallback
from lightning_rejuv.metrics import PlasticityMonitor
from lightning_rejuv.rejuvenate import RejuvenationError, rejuvenate
from lightning_rejuv.report import RejuvenationReport

__all__ = [
    "Anchor",
    "PlasticityCallback",
    "PlasticityMonitor",
    "RejuvenationCallback",
    "RejuvenationError",
    "RejuvenationReport",
    "rejuvenate",
]
