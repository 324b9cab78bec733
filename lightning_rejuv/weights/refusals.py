"""What cannot be edited in place, found before anything is: weights that are elsewhere, computed or quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_rejuv._compat import wraps_others
from lightning_rejuv.anchor import Anchor, AnchorSource
from lightning_rejuv.names import canonical_name, listing

EDITABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTISED_NAME = re.compile(
    r"\.(?:qweight|qzeros|g_idx|scales|weight_scale(?:_inv|_2)?|weight_packed|weight_zero_point|SCB|absmax"
    r"|quant_map|nested_absmax|weight_format|codebooks|quant_state\..+|.+_blocks|.+_scales)$"
)
# Modules of these have their weights packed where no parameter or buffer shows them.
_PACKED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def check_model(model: nn.Module) -> None:
    """Refuse a model whose weights are not in memory, or are not what its parameters hold.

    Raises:
        ValueError: parameters on the meta device, parametrised or pruned layers; with their names.
    """
    _check_in_memory(model)
    _check_computed(model)


def check_apart(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are to be edited and lie in one memory, without being one: they would be edited twice.

    Args:
        parameters: those that are fused or trained, by name; a tied one once.

    Raises:
        ValueError: with their names.
    """
    at: dict[tuple[torch.device, int], list[str]] = {}
    for name, parameter in parameters.items():
        # Parts of one buffer, as those of FSDP, begin at different places.
        if not wraps_others(parameter) and (place := parameter.data_ptr()) and parameter.numel():
            at.setdefault((parameter.device, place), []).append(canonical_name(name))
    shared = [" and ".join(names) for names in at.values() if len(names) > 1]
    if shared:
        raise ValueError(
            f"Expected parameters with a memory of their own but {listing(shared)} share one without being one "
            "parameter: what is edited would be edited twice. Tie them, so that both modules hold the same "
            "`nn.Parameter`, or give each a copy (`.clone()`)."
        )


def check_unquantised(model: nn.Module) -> None:
    """Refuse quantised weights, in parameters or beside them.

    Raises:
        ValueError: with their names.
    """
    wrong = dict(_quantised(model))
    if wrong:
        raise ValueError(
            f"Expected floating-point parameters but {listing(f'{n} ({d})' for n, d in wrong.items())} are not. "
            "Quantised weights cannot be interpolated: rejuvenate the model before it is quantised."
        )


def check_anchor(model: nn.Module, source: AnchorSource, anchor: Anchor, used: Iterable[str]) -> None:
    """Refuse an anchor that would move along with the model, or whose tensors are no floating-point weights.

    Args:
        model: the model.
        source: what the caller passed as the anchor.
        anchor: the same, opened.
        used: names of the anchor's tensors that stand for parameters of the model.

    Raises:
        ValueError: with the names of the tensors.
    """
    held = dict(anchor.held())
    used = list(used)
    elsewhere = [name for name in used if name in held and held[name].is_meta]
    if elsewhere:
        raise ValueError(
            f"Expected an anchor whose weights are in memory but {listing(elsewhere)} of {anchor.description} are on "
            "the meta device: it was offloaded, or built without weights. Pass the base's directory, which is read "
            "tensor by tensor."
        )
    kinds = {name: held[name].dtype if name in held else anchor.dtype(name) for name in used}
    wrong = {name: kind for name, kind in kinds.items() if kind is not None and kind not in EDITABLE}
    if wrong:
        raise ValueError(
            f"Expected the anchor ({anchor.description}) to hold weights of 16 bits or more but got "
            f"{listing(f'{name} ({kind})' for name, kind in wrong.items())}: quantised weights cannot be interpolated. "
            "Pass the base before it was quantised."
        )
    moving = {_storage(p): name for name, p in model.named_parameters() if p.requires_grad}
    moving.pop(None, None)
    shared = [
        moving[_storage(held[name])] for name in used if name in held and _storage(held[name]) in moving
    ]
    # Sharded parameters cannot be told by where they lie.
    inside = isinstance(source, nn.Module) and any(module is source for module in model.modules())
    if shared or inside:
        raise ValueError(
            f"Expected an anchor of its own but {anchor.description} shares its memory with the model: "
            f"{listing(shared) if shared else 'it is the model itself'}. It would move along when the model is trained "
            "or edited. Pass a copy from before SFT, such as `copy.deepcopy(…)`, or the base's directory."
        )


def _storage(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Return where a tensor's memory begins; None if it has none of its own on this process."""
    if wraps_others(tensor) or tensor.is_meta:
        return None
    place = tensor.untyped_storage().data_ptr()
    return (tensor.device, place) if place else None


def _check_in_memory(model: nn.Module) -> None:
    elsewhere = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if not elsewhere:
        return
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"Expected a model whose weights are in memory but {listing(elsewhere)} are on the meta device: accelerate "
            "has offloaded them (to the CPU's memory or to disk). Load the model whole, without `device_map`, or "
            "rejuvenate its checkpoint, which takes little memory: `lightning-rejuv rejuvenate`."
        )
    raise ValueError(
        f"Expected a model whose weights are in memory but {listing(elsewhere)} are on the meta device, without "
        "values. Load its weights first."
    )


def _check_computed(model: nn.Module) -> None:
    computed: dict[str, str] = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for key, steps in module.parametrizations.items():
                kinds = "+".join(type(step).__name__.lstrip("_") for step in steps)
                computed[canonical_name(f"{name}.{key}").lstrip(".")] = kinds
        for hook in module._forward_pre_hooks.values():
            # The older weight_norm and spectral_norm, and pruning: a hook computes the weight from what it keeps.
            if type(hook).__module__.startswith("torch.nn.utils."):
                key = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
                computed[canonical_name(f"{name}.{key}").lstrip(".")] = type(hook).__name__
    if computed:
        raise ValueError(
            "Expected weights that are parameters themselves but "
            f"{listing(f'{name} ({kind})' for name, kind in computed.items())} are computed from others, and a fusion "
            "of those is none of the weights. Remove it on the model and its anchor first "
            "(`torch.nn.utils.parametrize.remove_parametrizations`, `torch.nn.utils.remove_weight_norm`, "
            "`torch.nn.utils.prune.remove`), and register it again afterwards."
        )


def _quantised(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, parameter in model.named_parameters():
        # bitsandbytes may store four bits in a floating-point type.
        if parameter.dtype not in EDITABLE or hasattr(parameter, "quant_state") or hasattr(parameter, "SCB"):
            yield canonical_name(name), str(parameter.dtype)
    for name, buffer in model.named_buffers():
        if QUANTISED_NAME.search(f".{name}") and not buffer.is_floating_point():
            yield canonical_name(name), str(buffer.dtype)
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_PACKED):
            yield canonical_name(name), type(module).__name__
