"""Adapters on the head or the embedding of a base that ties the two."""

from __future__ import annotations

import torch

from lightning_rejuv.anchor.config import ties
from lightning_rejuv.anchor.tensors import is_head
from lightning_rejuv.checkpoints.checkpoint import Checkpoint, Reader
from lightning_rejuv.checkpoints.pairing import embedding_names, head_names
from lightning_rejuv.checkpoints.skeleton import skeleton
from lightning_rejuv.checkpoints.stream import SftRows, rows_of

_ROWS = 1 << 10  # rows that are compared at a time


def tied_embedding(base: Checkpoint) -> str | None:
    """Return the embedding that a base uses as its head, by its name on disk; None where it has a head of its own."""
    embeddings = embedding_names(base)
    if head_names(base) or not embeddings or ties(base.config) is False:
        return None
    try:
        model = skeleton(base.path)
    except (ImportError, ValueError):
        model = None
    if model is not None and not any(is_head(name) for name in model.all_tied_weights_keys):
        return None  # a model without a head
    return embeddings[0]


def check_still_tied(
    base: Checkpoint, reader: Reader, name: str, changed: dict[str, SftRows | None], alone: bool
) -> None:
    """Refuse an adapter after which the head is no longer the embedding, since a tied model cannot hold both.

    Args:
        base: the base, which ties them.
        reader: of the base.
        name: of the embedding.
        changed: for ``"embedding"`` and ``"head"`` what gives the SFT model's rows, None where the adapter leaves
            the base's.
        alone: the adapter trains the head by itself, whatever it holds by now.

    Raises:
        ValueError: with what to do.
    """
    entry = base.entry(name)
    sides = [changed[side] or rows_of(reader) for side in ("embedding", "head")]
    for start in range(0, entry.shape[0], _ROWS):
        stop = min(entry.shape[0], start + _ROWS)
        embedding, head = (rows(entry, start, stop).double() for rows in sides)
        if alone or not torch.allclose(embedding, head, rtol=1e-5, atol=1e-7):
            what = " and ".join(f"the {side}" for side, rows in changed.items() if rows is not None)
            raise ValueError(
                f"The base {str(base.path)!r} ties its head to its embedding but the adapter trains {what} so that "
                "the two differ, which no tied model can hold. Give the base a head of its own "
                "(`model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())`, "
                "`model.config.tie_word_embeddings = False`), merge the adapter into it with PEFT "
                "(`merge_and_unload()`), save it with `save_pretrained`, and pass the merged model. Or untie the two "
                "before SFT."
            )
