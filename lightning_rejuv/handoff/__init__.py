"""Checkpoints on disk: from a base and an SFT model to one that any RL trainer starts from."""

from lightning_rejuv.handoff.adapt import rejuvenate_adapter
from lightning_rejuv.handoff.adapter import is_adapter
from lightning_rejuv.handoff.alphas import read_alphas
from lightning_rejuv.handoff.diagnose import diagnose
from lightning_rejuv.handoff.diagnosis import Diagnosis
from lightning_rejuv.handoff.merge import merge_adapter
from lightning_rejuv.handoff.rejuvenate import rejuvenate_checkpoint
from lightning_rejuv.handoff.report import HandoffReport
from lightning_rejuv.handoff.verify import Verification, verify

__all__ = [
    "Diagnosis",
    "HandoffReport",
    "Verification",
    "diagnose",
    "is_adapter",
    "merge_adapter",
    "read_alphas",
    "rejuvenate_adapter",
    "rejuvenate_checkpoint",
    "verify",
]
