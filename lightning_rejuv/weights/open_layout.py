"""Which layout a model has: found from what its parameters are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_rejuv._compat import is_dtensor, is_fsdp1_parameter, reshard, wraps_others
from lightning_rejuv.names import listing
from lightning_rejuv.weights.layout import Layout


def open_layout(model: nn.Module, root: nn.Module | None = None) -> Layout:
    """Find how a model's parameters are stored, from what they are.

    Args:
        model: the model.
        root: the module around it that a strategy has wrapped, if it is not the model itself.

    Raises:
        ValueError: a kind of parameter that is not known; nothing is guessed.
    """
    outermost = model if root is None else root  # a module may have a length, and be false by it
    reshard(outermost)
    reshard(model)
    parameters = dict(model.named_parameters())
    unknown = {n: type(p).__name__ for n, p in parameters.items() if wraps_others(p) and not is_dtensor(p)}
    if unknown:
        raise ValueError(
            "Expected plain parameters, DTensors (FSDP2, tensor parallel), or those of FSDP or DeepSpeed, but got "
            f"{listing(f'{n} ({kind})' for n, kind in unknown.items())}. Rejuvenate the checkpoint before this "
            "run: `lightning-rejuv`."
        )
    if any(hasattr(p, "ds_id") for p in parameters.values()) or _under_deepspeed(parameters):
        from lightning_rejuv.weights.deepspeed import DeepSpeedLayout

        return DeepSpeedLayout(parameters)
    if any(is_fsdp1_parameter(p) for p in parameters.values()):
        from lightning_rejuv.weights.fsdp1 import FSDP1Layout

        return FSDP1Layout(model, outermost)
    if any(is_dtensor(p) for p in parameters.values()):
        from lightning_rejuv.weights.dtensor import DTensorLayout

        return DTensorLayout(parameters)
    return Layout(parameters)


def _under_deepspeed(parameters: Mapping[str, nn.Parameter]) -> bool:
    """ZeRO 1 and 2 leave parameters whole, but link each to its float32 master."""
    return any(hasattr(p, "_hp_mapping") for p in parameters.values())
