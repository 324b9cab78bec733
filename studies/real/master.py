"""Float32 weights that an optimizer updates, beside the model that computes, in the fast dtype of the hardware."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch.optim import AdamW
from transformers import PreTrainedModel

BETAS = (0.9, 0.99)
MAX_GRAD_NORM = 1.0


def fast_dtype(device: str) -> torch.dtype:
    """Return bfloat16 if the hardware has units for it, else float32.

    Without them a product of matrices in bfloat16 is many times slower than in float32.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and newer
    has_units = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has_units else torch.float32


class MasterWeights(L.LightningModule):
    """What SFT and GRPO share: AdamW without weight decay, gradients clipped to a norm of 1.

    Args:
        model: The weights to train, in float32 (tests: or wider).
        learning_rate: Constant.
        dtype: What is computed in.

    Attributes:
        master: The weights that are updated.
        model: What computes: the same module, or a copy in `dtype` that follows it.
    """

    def __init__(self, model: PreTrainedModel, learning_rate: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = learning_rate
        self.master = model
        self.model = model if dtype == model.dtype else copy.deepcopy(model).to(dtype)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the master weights."""
        return AdamW(
            self.master.parameters(), lr=self.learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch as it is: it holds lists of token ids or questions."""
        return batch

    def update(self) -> float:
        """Take one step with the gradients that the model holds; return their norm before clipping."""
        optimizer: Any = self.optimizers()
        pairs = list(zip(self.model.parameters(), self.master.parameters(), strict=True))
        apart = self.model is not self.master
        if apart:
            for computes, master in pairs:
                master.grad = None if computes.grad is None else computes.grad.to(master.dtype)
                computes.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self.master.parameters(), MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if apart:
            with torch.no_grad():
                for computes, master in pairs:
                    computes.copy_(master)
        return norm
