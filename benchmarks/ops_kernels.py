"""Other people's kernels for the statistics of tokens, measured where they are at hand.

Liger's cross entropies are taken from its package, ``liger-kernel``. Two more are single files that are no package;
``--kernels DIR`` names the folder with them, and where a file is missing its rows are left out:

- ``logprob_entropy.py``: TRL's log-probability and entropy, ``trl/kernels/logprob_entropy.py`` of ``trl``;
- ``verl_kernels.py``: verl's log-probability and entropy from hidden states, ``verl/utils/kernel/kernels.py``
  of ``verl``.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from ops_measure import installed
from torch import Tensor

Run = Callable[[], object]


def tokens(x: Tensor, y: Tensor, folder: Path | None) -> dict[str, Run]:
    """Return what computes some statistics of D from logits, by the name of its row; loaded by its first call."""
    found: dict[str, Run] = {}
    if not x.is_cuda:
        return found
    if folder and (path := folder / "logprob_entropy.py").exists():
        found["TRL kernel (2 of 5)"] = lambda: _load(path).selective_log_softmax_and_entropy(x, y)
    if installed("liger-kernel") != "none":
        found["Liger cross entropy (loss only)"] = lambda: _liger()(x, y)
    return found


def tokens_from_hidden(h: Tensor, w: Tensor, y: Tensor, folder: Path | None) -> dict[str, Run]:
    """Return what computes some statistics of D from hidden states, likewise."""
    found: dict[str, Run] = {}
    if not h.is_cuda:
        return found
    if installed("liger-kernel") != "none":
        found["Liger linear cross entropy (loss only)"] = lambda: _liger_linear()(w, h, y)
    if not (folder and (path := folder / "verl_kernels.py").exists()):
        return found
    device = types.ModuleType("verl.utils.device")  # all that the file takes from its package
    device.is_cuda_available = True
    device.get_device_name = lambda: "cuda"
    device.get_torch_device = lambda: torch.cuda
    device.get_device_capability = torch.cuda.get_device_capability
    for name in ("verl", "verl.utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["verl.utils.device"] = device
    not_reduced = 0
    found["verl kernel (2 of 5)"] = lambda: _load(path).efficient_entropy_forward(h, w, y, not_reduced, 1.0)
    return found


@functools.cache
def _liger() -> Callable[[Tensor, Tensor], object]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(reduction="none")


@functools.cache
def _liger_linear() -> Callable[[Tensor, Tensor, Tensor], object]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="none")


@functools.cache
def _load(path: Path) -> types.ModuleType:
    """Return a file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"Expected a Python file at {str(path)!r}.")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
