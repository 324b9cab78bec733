"""The application: what is imported here has a short name in YAML files and on the command line."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from transformers.utils import logging as transformers_logging

# Imported for their names: `class_path: RejuvenationCallback` is found because the class is loaded.
from examples.lightning_cli.monitor import HeldOutMonitor
from examples.lightning_cli.stages import PretrainingStage, RLStage, SFTStage, Stage
from lightning_rejuv.callbacks import PlasticityCallback, RejuvenationCallback, WhenMetric

__all__ = [
    "HeldOutMonitor",
    "PlasticityCallback",
    "PretrainingStage",
    "RLStage",
    "RejuvenationCallback",
    "SFTStage",
    "Stage",
    "WhenMetric",
    "main",
]


def main(args: Any = None) -> LightningCLI:
    """Parse, build and run; `args` stands for the command line where it is called from Python."""
    torch.set_num_threads(1)  # a model of 0.1 M parameters is fastest on one core
    torch.set_flush_denormal(True)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*IterableDataset.*__len__.*")  # one process reads it
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # data is made in memory
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    return LightningCLI(
        Stage,
        subclass_mode_model=True,
        auto_configure_optimizers=False,  # the stages bring theirs
        seed_everything_default=False,  # and draw everything from their own `seed`
        parser_kwargs={"prog": "python -m examples.lightning_cli"},
        args=args,
    )
