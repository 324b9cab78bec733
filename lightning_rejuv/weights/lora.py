"""Models with LoRA adapters (PEFT): the base lies under the adapter, so that fusion scales the adapter.

With W_sft = W + s·B·A, ``alpha * W_sft + (1 - alpha) * W = W + s·(alpha·B)·A``: pulling B toward zero is the
fusion, zeroing a row of B or a column of A resets an output row or an input column. Exact for LoRA and
rsLoRA; DoRA has a formula of its own. PEFT is not imported: its layers are known by their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lightning_rejuv.adapters import (
    adapter_of,
    check_adapters,
    config_of,
    holds_adapter,
    is_lora,
    parameters_of_adapters,
)
from lightning_rejuv.anchor import Anchor
from lightning_rejuv.functional.weights import _relative_drift_update
from lightning_rejuv.names import PEFT_ROOT, canonical_name, listing
from lightning_rejuv.weights.drift import Drift
from lightning_rejuv.weights.refusals import check_anchor


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
    weight, change = _weight_and_change(module)
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


def _weight_and_change(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The base's weight [out, in], and what the adapter adds to it before DoRA's lengths."""
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
    weight, change = _weight_and_change(module)
    assert magnitude is not None
    assert change is not None
    scale = magnitude / (weight + change).norm(dim=1)
    rest = share * scale + 1 - share
    module.get_parameter(f"lora_B.{adapter_of(module)}.weight").mul_((share * scale / rest)[:, None])
    _, change = _weight_and_change(module)
    assert change is not None
    magnitude.copy_((weight + change).norm(dim=1) * rest)


def lora_targets(
    model: nn.Module, anchor: Anchor | None
) -> tuple[
    dict[str, nn.Parameter],
    Callable[[str], Tensor],
    Callable[[], dict[str, Drift]],
    dict[str, Callable[[float], None]],
]:
    """Find what a fusion edits in a model with adapters.

    Args:
        model: a PEFT model with one active LoRA adapter; others may be there, and are left as they are.
        anchor: where the base's values of parameters come from that were trained in place (``bias="all"``);
            not needed without such.

    Returns:
        The parameters that fusion edits; what they are pulled toward; a measurement of the drift, by the
        name of the adapted weight; and for DoRA's lengths, by name, what fuses their layer.

    Raises:
        ValueError: what :func:`check_adapters` refuses, a trained parameter without a base.
    """
    check_adapters(model)
    layers = dict(lora_layers(model))
    names = {id(p): name for name, p in model.named_parameters()}
    edited: dict[str, nn.Parameter] = {}
    bases: dict[str, Tensor] = {}
    pulls: dict[str, Callable[[float], None]] = {}
    for module in layers.values():
        adapter = adapter_of(module)
        for table in ("lora_A", "lora_B"):
            for parameter in getattr(module, table)[adapter].parameters():
                name = names[id(parameter)]
                bases[name] = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                if table == "lora_B":
                    edited[name] = parameter
                    if magnitude_of(module) is not None:
                        pulls[name] = _with_the_lengths
        magnitude = magnitude_of(module)
        if magnitude is not None:
            name = names[id(magnitude)]
            edited[name] = magnitude
            bases[name] = _weight_and_change(module)[0].norm(dim=1)
            pulls[name] = partial(pull_dora, module)
    for saved, original in _saved_modules(model):
        for parameter, base in zip(saved.parameters(), original.parameters(), strict=True):
            edited[names[id(parameter)]] = parameter
            bases[names[id(parameter)]] = base.detach()
    trained = _trained_in_place(model)
    bases.update(_bases_of_trained(model, trained, anchor))
    edited.update(trained)

    def measure() -> dict[str, Drift]:
        drift = {}
        for name, module in layers.items():
            sums = _relative_drift_update(merged_weight(module), _weight_and_change(module)[0])
            drift[f"{name}.weight"] = Drift(float(sums[0]), float(sums[1]))
        for name, parameter in edited.items():
            if "lora_B" not in name and name not in pulls:
                sums = _relative_drift_update(parameter, bases[name])
                drift[name] = Drift(float(sums[0]), float(sums[1]))
        return drift

    return edited, bases.__getitem__, measure, pulls


def _with_the_lengths(_share: float) -> None:
    """B of a DoRA layer is edited together with the lengths, which follow it."""


def _saved_modules(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules that PEFT trains as a whole (``modules_to_save``), and the originals beside them."""
    for module in model.modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            for adapter in module.active_adapters:  # type: ignore[union-attr]
                if adapter in module.modules_to_save:  # type: ignore[operator]
                    yield module.modules_to_save[adapter], module.original_module  # type: ignore[index, misc]


def _trained_in_place(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the base that were trained: those that are now, and the biases that PEFT trains along."""
    adapters = {id(parameter) for parameter in parameters_of_adapters(model)}
    layers = dict(lora_layers(model))
    biases = {str(config_of(model, adapter_of(module)).get("bias")) for module in layers.values()}
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapters or ".original_module." in name:
            continue
        owner = name.removesuffix(".base_layer.bias")
        along = "lora_only" in biases and owner != name and owner in layers
        if parameter.requires_grad or along or ("all" in biases and "bias" in name.split(".")[-1]):
            trained[name] = parameter
    return trained


def _bases_of_trained(
    model: nn.Module, trained: dict[str, nn.Parameter], anchor: Anchor | None
) -> dict[str, Tensor]:
    if not trained:
        return {}
    if anchor is None:
        raise ValueError(
            f"The parameters {listing(trained)} were trained in place, so that their base values are not in the "
            "adapter. Pass the base as `anchor`."
        )
    plain = {name: name_in_base(name) for name in trained}
    missing = set(plain.values()) - set(anchor.names())
    if missing:
        raise ValueError(f"The anchor ({anchor.description}) does not hold {listing(missing)}.")
    check_anchor(model, anchor, anchor, plain.values())
    return {name: anchor.tensor(there) for name, there in plain.items()}
