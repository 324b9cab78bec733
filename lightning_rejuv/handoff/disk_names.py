"""Names and layouts on disk of what a model in memory selects: transformers' conversion, run backwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.handoff.checkpoint import Checkpoint
from lightning_rejuv.handoff.pattern import Pattern, pattern_of
from lightning_rejuv.names import listing


def to_disk_layout(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model's parameters as ``save_pretrained`` would store them.

    Fused experts are taken apart, renamed weights get their name on disk, transposed ones are turned back.
    Works for masks and for tensors without data, too: layouts differ by permutations only.
    """
    from transformers import core_model_loading

    return dict(core_model_loading.revert_weight_conversion(model, dict(state)))


def on_disk(model: nn.Module, checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> dict[str, Pattern]:
    """Find the weights on disk that masks of parameters in memory select.

    Args:
        model: the model as it was loaded from the checkpoint.
        checkpoint: the files.
        masks: bool, in the shape of the parameter, for some of the model's parameters.

    Raises:
        ValueError: a parameter has no tensor of its own on disk; it is named.
    """
    # A mask of zeros takes one byte, whatever its shape: conversions of several tensors need all of them.
    empty = torch.zeros(1, dtype=torch.bool)
    tied: dict[str, Any] = getattr(model, "all_tied_weights_keys", None) or {}
    state = {
        name: masks.get(name, empty.expand(parameter.shape))
        for name, parameter in model.named_parameters()
        if name not in tied
    }
    found = {}
    for name, mask in to_disk_layout(model, state).items():
        if not bool(mask.any()):
            continue
        if name not in checkpoint.place or checkpoint.entry(name).shape != tuple(mask.shape):
            raise ValueError(
                f"The neurons to reset lie in {name!r} {tuple(mask.shape)}, which {str(checkpoint.path)!r} "
                "does not "
                f"hold in that form: it holds {listing(checkpoint.place)}. Save it again with "
                "`save_pretrained`, or "
                "set `reset_fraction=0` for fusion alone."
            )
        found[name] = pattern_of(mask)
    selected = sum(int(mask.sum()) for mask in masks.values())
    if selected != sum(pattern.count for pattern in found.values()):
        raise ValueError(
            f"Expected the {selected} selected weights of {listing(masks)} on disk but found "
            f"{sum(p.count for p in found.values())}: this family stores them in a form that is not known. "
            "Set "
            "`reset_fraction=0` for fusion alone."
        )
    return found
