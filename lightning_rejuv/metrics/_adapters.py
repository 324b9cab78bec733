"""Models with adapters (PEFT) beside the base that lies under them: neither is changed, and nothing is merged in place.

PEFT is not imported: its layers are known by their attributes. A layer with an adapter holds the layer of the base as
``base_layer``; a module that is trained as a whole holds the original as ``original_module``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import adapters_are_disabled
from lightning_rejuv.adapters import CHANGE_THE_BASE, is_tuner, is_wrapper
from lightning_rejuv.names import listing

# Kinds of adapters that work outside of the layers: on the inputs, on the attention's keys, or by a pass of their own.
_OUTSIDE = ("ADAPTION_PROMPT", "XLORA")


class NotMergeable(ValueError):
    """An adapter whose weights cannot be added to the base's."""


def check_adapters(outermost: nn.Module) -> None:
    """Refuse adapters outside of the layers: the model inside would be measured without them.

    Raises:
        ValueError: the adapters are those of prompt tuning and its kin.
    """
    kinds = [kind for kind, config in _configs(outermost) if kind in _OUTSIDE or _is_prompt(config)]
    if kinds:
        raise ValueError(
            f"Expected adapters in the model's layers, such as LoRA, but got {kinds[0]}, which works outside of them: "
            "such a model cannot be measured on a probe. Leave PlasticityMonitor's `anchor`, `probe` and "
            "`base_samples` out."
        )


def why_base_is_unknown(model: nn.Module) -> str | None:
    """Say why what lies under the adapters is not the base; None if it is."""
    for _, config in _configs(model):
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if start.startswith(CHANGE_THE_BASE):
            return f"the adapter was initialised with {start!r}, which changes the base"
    merged = [name for name, module in model.named_modules() if is_tuner(module) and _is_merged(module)]
    if merged:
        return f"the adapters of {listing(merged)} are merged"
    along = any(getattr(config, "bias", "none") != "none" for _, config in _configs(model))
    trained = [
        name
        for name, parameter in under_adapters(model)
        if parameter.requires_grad or (along and name.rpartition(".")[2] == "bias")
    ]
    return f"{listing(trained)} were trained in place" if trained else None


def without_adapters(model: nn.Module) -> Any:
    """Run a model as the base that lies under its adapters; this is a context manager.

    Merged layers are left as they are: they compute with what their ``base_layer`` holds.
    """
    return adapters_are_disabled(
        module
        for module in model.modules()
        if is_wrapper(module) or (is_tuner(module) and not _is_merged(module))
    )


def under_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter of the base by its name without adapters, a tied one under each of its names."""
    return ((name, tensor) for name, tensor in _walk(model, "") if isinstance(tensor, nn.Parameter))


def plain_view(model: nn.Module) -> nn.Module:
    """Return a module with the base's own parameters and buffers, by the names that they have without adapters."""
    root = nn.Module()
    for name, tensor in _walk(model, ""):
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
    return root


def with_adapters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter as it is with the adapters, in the order and by the names of :func:`under_adapters`.

    Layers with an adapter are merged one by one, each in a copy of its own, in float32 or better.

    Raises:
        NotMergeable: an adapter is of a kind that cannot be merged, or lies on quantised weights.
    """
    if is_tuner(model):
        yield from (
            (n, t) for n, t in _walk(_merged_copy(model, prefix), prefix) if isinstance(t, nn.Parameter)
        )
        return
    if is_wrapper(model):
        yield from with_adapters(_trained(model), prefix)
        return
    yield from ((prefix + name, p) for name, p in model._parameters.items() if p is not None)
    for name, child in model.named_children():
        yield from with_adapters(child, f"{prefix}{name}.")


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if is_tuner(module):
        yield from _walk(module.get_submodule("base_layer"), prefix)
        return
    if is_wrapper(module):
        yield from _walk(_original(module), prefix)
        return
    for table in (module._parameters, module._buffers):
        yield from ((prefix + name, tensor) for name, tensor in table.items() if tensor is not None)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.")


def _merged_copy(layer: nn.Module, name: str) -> nn.Module:
    """Return a copy of a layer, without its hooks and what they hold, with its adapters merged into its weights."""
    hooks = {
        id(v): type(v)() for part in layer.modules() for k, v in vars(part).items() if k.endswith("_hooks")
    }
    weights = [t for _, t in _walk(layer, "") if isinstance(t, nn.Parameter)]
    if not all(weight.is_floating_point() for weight in weights):
        raise NotMergeable(f"the weights of {name.removesuffix('.')!r} are quantised")
    wide = torch.float32
    for weight in weights:
        wide = torch.promote_types(wide, weight.dtype)
    copied = copy.deepcopy(layer, hooks).to(wide)
    # Nested layers are merged from the inside.
    for part in reversed([part for part in copied.modules() if is_tuner(part)]):
        if part.disable_adapters or _is_merged(part):
            continue
        try:
            part.merge()  # type: ignore[operator]
        except Exception as error:  # adapters refuse with errors of many types
            kind = type(part).__module__.split(".")[2:3] or [type(part).__name__]
            raise NotMergeable(
                f"the adapter of {name.removesuffix('.')!r} ({kind[0]}) cannot be merged: {error}"
            ) from error
    return copied


def _is_merged(module: nn.Module) -> bool:
    return bool(getattr(module, "merged", False))


def _original(wrapper: nn.Module) -> nn.Module:
    original = wrapper.original_module
    assert isinstance(original, nn.Module)
    return original


def _trained(wrapper: nn.Module) -> nn.Module:
    """Return what a wrapper uses: the adapter's module, or the original if the active adapter has none."""
    if wrapper.disable_adapters:
        return _original(wrapper)
    if "token_adapter" in wrapper._modules:
        return wrapper.get_submodule("token_adapter")
    saved = wrapper.get_submodule("modules_to_save")
    active = [name for name in wrapper.active_adapters if name in saved]  # type: ignore[operator, union-attr]
    return saved.get_submodule(active[0]) if active else _original(wrapper)


def _configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for module in model.modules():
        found = getattr(module, "peft_config", None)
        if isinstance(found, Mapping):
            for config in found.values():
                kind = getattr(config, "peft_type", None)
                yield str(getattr(kind, "value", kind)), config


def _is_prompt(config: Any) -> bool:
    return bool(getattr(config, "is_prompt_learning", False))
