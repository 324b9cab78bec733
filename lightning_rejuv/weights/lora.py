"""Models with LoRA adapters (PEFT): the base lies under the adapter, so that fusion scales the adapter.

With W_sft = W + s·B·A, ``alpha * W_sft + (1 - alpha) * W = W + s·(alpha·B)·A``: pulling B toward zero is the
fusion, zeroing a row of B or a column of A resets an output row or an input column. Exact for LoRA and
rsLoRA; DoRA has a formula of its own. PEFT is not imported: its layers are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_rejuv.adapters import adapter_of, holds_adapter, is_lora
from lightning_rejuv.names import PEFT_ROOT, canonical_name


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that the active adapter is on, by name."""
    return ((name, module) for name, module in model.named_modules() if holds_adapter(module))


def name_in_base(name: str) -> str:
    """Return the name that a parameter or buffer of a model with adapters has in its base.

    >>> name_in_base("base_model.model.model.layers.0.q_proj.base_layer.bias")
    'model.layers.0.q_proj.bias'
    """
    return canonical_name(name).removeprefix(PEFT_ROOT).replace(".base_layer.", ".")


def merged_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight [out, in] with its adapter added; the weight itself if the layer has none."""
    weight, change = weight_and_change(module)
    if change is None:
        return weight
    magnitude = magnitude_of(module)
    moved = weight + change
    return moved if magnitude is None else with_lengths(moved, magnitude.detach())


def with_lengths(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return a weight [out, in] whose rows are rescaled to the lengths [out] that DoRA trains.

    >>> with_lengths(torch.tensor([[3.0, 4.0]]), torch.tensor([10.0]))
    tensor([[6., 8.]])
    """
    rescaled: Tensor = weight * (magnitude / weight.norm(dim=1))[:, None]
    return rescaled


def magnitude_of(module: nn.Module) -> nn.Parameter | None:
    """The lengths [out] of a DoRA layer's rows; None for plain LoRA."""
    lengths = getattr(module, "lora_magnitude_vector", {})
    if not holds_adapter(module) or (adapter := adapter_of(module)) not in lengths:
        return None
    return lengths[adapter].weight  # type: ignore[no-any-return]


def weight_and_change(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the base's weight [out, in], and what the adapter adds to it before DoRA's lengths; None without one."""
    owner = module.get_submodule("base_layer") if is_lora(module) else module
    weight = owner.get_parameter("weight").detach()
    change: Tensor | None = None
    if holds_adapter(module):
        change = module.get_delta_weight(adapter_of(module)).detach()  # type: ignore[operator]
    if type(owner).__name__ == "Conv1D":  # transformers keeps its weight as [in, out]
        return weight.t(), None if change is None else change.t()
    return weight, change


@torch.no_grad()
def pull_dora(module: nn.Module, share: float) -> None:
    """Fuse a DoRA layer with the base under it, exactly: ``share * W_dora + (1 - share) * W``.

    With W_dora = D (W + s·B·A) and D = diag(m / ‖W + s·B·A‖), row by row, the fusion is
    R (W + s·(R⁻¹·share·D·B)·A) with R = share·D + 1 - share: DoRA again, with rows of B scaled and new lengths.

    Args:
        module: the layer; B and the lengths are edited.
        share: weight of the SFT model.
    """
    magnitude = magnitude_of(module)
    weight, change = weight_and_change(module)
    assert magnitude is not None
    assert change is not None
    scale = magnitude / (weight + change).norm(dim=1)
    rest = share * scale + 1 - share
    module.get_parameter(f"lora_B.{adapter_of(module)}.weight").mul_((share * scale / rest)[:, None])
    _, change = weight_and_change(module)
    assert change is not None
    magnitude.copy_((weight + change).norm(dim=1) * rest)
