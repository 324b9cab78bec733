"""What cannot be fused: quantised weights, a base of another architecture, a config that contradicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_rejuv.anchor.config import configs
from lightning_rejuv.checkpoints.checkpoint import CONFIG, Checkpoint
from lightning_rejuv.names import listing
from lightning_rejuv.weights.refusals import QUANTISED_NAME

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Equal shapes do not say that these are equal, and weights mean something else where they are not.
_SAME = (
    "model_type",
    "num_hidden_layers",
    "n_layer",
    "hidden_size",
    "n_embd",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "hidden_act",
    "activation_function",
)
_BETTER_SAME = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window")


def check_fusable(checkpoint: Checkpoint, role: str) -> None:
    """Refuse quantised weights.

    Raises:
        ValueError: the config names a quantisation, or tensors are stored in quantised form.
    """
    found = next(
        (c["quantization_config"] for c in configs(checkpoint.config) if c.get("quantization_config")), 0
    )
    quantised = [
        name
        for name, (_, entry) in checkpoint.place.items()
        if entry.dtype in _FLOAT8
        or QUANTISED_NAME.search(name)
        or (name.endswith(".weight") and not entry.dtype.is_floating_point)
    ]
    if found or quantised:
        what = f"`quantization_config` {found!r:.120}" if found else f"quantised tensors {listing(quantised)}"
        raise ValueError(
            f"Expected the {role} {str(checkpoint.path)!r} to hold full-precision weights but found {what}: "
            "an interpolation of quantised numbers means nothing. Dequantise it first and save it as "
            "bfloat16."
        )


def check_same_architecture(sft: Checkpoint, base: Checkpoint) -> list[str]:
    """Refuse a base of another architecture.

    Returns:
        Warnings: settings that fine-tuning may change, but that change what weights mean.

    Raises:
        ValueError: with the key of ``config.json`` and both values.
    """
    warnings = []
    for path, ours, theirs in _pairs(sft.config, base.config):
        for key in _SAME:
            if _differ(ours.get(key), theirs.get(key)):
                raise ValueError(
                    f"Expected the base to have the SFT model's architecture but `{path}{key}` in {CONFIG} "
                    f"is {ours[key]!r:.200} in {str(sft.path)!r} and {theirs[key]!r:.200} in {str(base.path)!r}. "
                    "Pass the "
                    "checkpoint that SFT started from."
                )
        for key in _BETTER_SAME:
            if _differ(ours.get(key), theirs.get(key)):
                warnings.append(
                    f"`{path}{key}` is {ours[key]!r:.200} in the SFT model and {theirs[key]!r:.200} in the base"
                )
    return warnings


def _pairs(
    ours: dict[str, Any], theirs: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    yield path, ours, theirs
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and "model_type" in value:
            yield from _pairs(value, other, f"{path}{key}.")


def _differ(ours: Any, theirs: Any) -> bool:
    return ours is not None and theirs is not None and ours != theirs
