"""What a fusion edits in a model with LoRA adapters (PEFT), and what each parameter is pulled toward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rejuv.adapters import (
    adapter_of,
    check_adapters,
    config_of,
    is_saved_module,
    parameters_of_adapters,
)
from lightning_rejuv.anchor import Anchor
from lightning_rejuv.functional.weights import _relative_drift_update
from lightning_rejuv.names import listing
from lightning_rejuv.weights.buffers import find_buffers
from lightning_rejuv.weights.drift import Drift
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.lora import (
    lora_layers,
    magnitude_of,
    merged_weight,
    name_in_base,
    pull_dora,
    weight_and_change,
)
from lightning_rejuv.weights.refusals import check_anchor
from lightning_rejuv.weights.targets import Targets


@dataclass(frozen=True, kw_only=True)
class AdapterTargets(Targets):
    """The targets of a model with adapters, which are pulled toward nothing: their base lies under them.

    Attributes:
        bases: by name what each parameter is pulled toward.
        layers: the layers with an adapter, by name.
        lengths: those of DoRA, by the name of the parameter that holds the lengths.
        followers: the names of B in these layers, which follow the lengths.
        anchor: where the values of buffers come from; None if there is no anchor.
    """

    bases: Mapping[str, Tensor]
    layers: Mapping[str, nn.Module]
    lengths: Mapping[str, nn.Module]
    followers: frozenset[str]
    anchor: Anchor | None

    @property
    def dora(self) -> bool:
        """Whether a layer has lengths of its own."""
        return bool(self.lengths)

    def anchor_of(self, name: str) -> Tensor:
        """Return the anchor's buffer, or what a parameter is pulled toward."""
        if name in self.buffers.fused:
            assert self.anchor is not None  # only what an anchor holds is fused
            return self.anchor.tensor(self.buffers.anchor_names[name])
        return self.bases[name]

    def measure(self) -> dict[str, Drift]:
        """Measure every adapted weight against the one under its adapter, and what was trained beside them."""
        drift = {}
        for name, module in self.layers.items():
            sums = _relative_drift_update(merged_weight(module), weight_and_change(module)[0])
            drift[f"{name}.weight"] = Drift(float(sums[0]), float(sums[1]))
        for name, parameter in self.parameters.items():
            if "lora_B" not in name and name not in self.lengths:
                sums = _relative_drift_update(parameter, self.bases[name])
                drift[name] = Drift(float(sums[0]), float(sums[1]))
        return drift

    def pull(self, name: str, share: float) -> bool:
        """Fuse a layer with DoRA when its lengths are reached; its B is moved along."""
        if name in self.lengths:
            pull_dora(self.lengths[name], share)
        return name in self.lengths or name in self.followers


def adapter_targets(model: nn.Module, anchor: Anchor | None, layout: Layout) -> AdapterTargets:
    """Find what a fusion edits in a model with adapters.

    Args:
        model: a PEFT model with one active LoRA adapter; others may be there, and are left as they are.
        anchor: where the base's values of parameters come from that were trained in place (``bias="all"``);
            not needed without such.
        layout: how the parameters are stored.

    Raises:
        ValueError: what :func:`check_adapters` refuses, a trained parameter without a base.
    """
    check_adapters(model)
    layers = dict(lora_layers(model))
    names = {id(p): name for name, p in model.named_parameters()}
    edited: dict[str, nn.Parameter] = {}
    bases: dict[str, Tensor] = {}
    lengths: dict[str, nn.Module] = {}
    followers: set[str] = set()
    for module in layers.values():
        magnitude = magnitude_of(module)
        for table in ("lora_A", "lora_B"):
            for parameter in getattr(module, table)[adapter_of(module)].parameters():
                name = names[id(parameter)]
                bases[name] = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                if table == "lora_B":
                    edited[name] = parameter
                    followers.update([name] if magnitude is not None else [])
        if magnitude is not None:
            name = names[id(magnitude)]
            edited[name] = magnitude
            bases[name] = weight_and_change(module)[0].norm(dim=1)
            lengths[name] = module
    for saved, original in _saved_modules(model):
        for parameter, base in zip(saved.parameters(), original.parameters(), strict=True):
            edited[names[id(parameter)]] = parameter
            bases[names[id(parameter)]] = base.detach()
    trained = _trained_in_place(model)
    bases.update(_bases_of_trained(model, trained, anchor))
    edited.update(trained)
    return AdapterTargets(
        edited,
        layout,
        find_buffers(model, anchor, name_in_base),
        "the base under the adapters",
        bases=bases,
        layers=layers,
        lengths=lengths,
        followers=frozenset(followers),
        anchor=anchor,
    )


def _saved_modules(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules that PEFT trains as a whole (``modules_to_save``), and the originals beside them."""
    for module in model.modules():
        if is_saved_module(module):
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
    return {name: anchor.tensor(in_base) for name, in_base in plain.items()}
