"""Checkpoints on disk: from a base and an SFT model to one that any RL trainer starts from."""

from lightning_rejuv.checkpoints.adapt import rejuvenate_adapter
from lightning_rejuv.checkpoints.adapter import is_adapter
from lightning_rejuv.checkpoints.alphas import read_alphas
from lightning_rejuv.checkpoints.diagnose import diagnose
from lightning_rejuv.checkpoints.diagnosis import Diagnosis
from lightning_rejuv.checkpoints.merge import merge_adapter
from lightning_rejuv.checkpoints.rejuvenate import rejuvenate_checkpoint
from lightning_rejuv.checkpoints.report import CheckpointReport
from lightning_rejuv.checkpoints.verify import Verification, verify

__all__ = [
    "CheckpointReport",
    "Diagnosis",
    "Verification",
    "diagnose",
    "is_adapter",
    "merge_adapter",
    "read_alphas",
    "rejuvenate_adapter",
    "rejuvenate_checkpoint",
    "verify",
]
