"""Restore the plasticity of an over-trained language model between SFT and RL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_rejuv.anchor import Anchor
from lightning_rejuv.rejuvenate import RejuvenationError, rejuvenate
from lightning_rejuv.report import RejuvenationReport

if TYPE_CHECKING:
    from lightning_rejuv.callbacks import PlasticityCallback, RejuvenationCallback
    from lightning_rejuv.metrics import PlasticityMonitor

__all__ = [
    "Anchor",
    "PlasticityCallback",
    "PlasticityMonitor",
    "RejuvenationCallback",
    "RejuvenationError",
    "RejuvenationReport",
    "rejuvenate",
]

# Lightning and torchmetrics take seconds to import; the command line and functions on checkpoints need neither.
_LATER = {
    "PlasticityCallback": "lightning_rejuv.callbacks",
    "RejuvenationCallback": "lightning_rejuv.callbacks",
    "PlasticityMonitor": "lightning_rejuv.metrics",
}
_ROOMS = ("callbacks", "functional", "handoff", "metrics")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in _ROOMS:
        return import_module(f"lightning_rejuv.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
