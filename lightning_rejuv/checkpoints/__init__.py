"""Checkpoints on disk: from a base and an SFT model to one that any RL trainer starts from."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_rejuv.checkpoints.commands import diagnose, rejuvenate_checkpoint

if TYPE_CHECKING:
    from lightning_rejuv.checkpoints.adapter import is_adapter, rejuvenate_adapter
    from lightning_rejuv.checkpoints.diagnosis import Diagnosis
    from lightning_rejuv.checkpoints.merge import merge_adapter
    from lightning_rejuv.checkpoints.options import given_alpha, read_alphas
    from lightning_rejuv.checkpoints.report import CheckpointReport
    from lightning_rejuv.checkpoints.verification import Verification, verify

__all__ = [
    "CheckpointReport",
    "Diagnosis",
    "Verification",
    "diagnose",
    "given_alpha",
    "is_adapter",
    "merge_adapter",
    "read_alphas",
    "rejuvenate_adapter",
    "rejuvenate_checkpoint",
    "verify",
]

# The module of each name that needs torch, which is imported at the first use of the name.
_LATER = {
    "CheckpointReport": "report",
    "Diagnosis": "diagnosis",
    "Verification": "verification",
    "given_alpha": "options",
    "is_adapter": "adapter",
    "merge_adapter": "merge",
    "read_alphas": "options",
    "rejuvenate_adapter": "adapter",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
