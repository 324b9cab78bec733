"""Embedding and head of a checkpoint: which tensors they are, and whether they are one, as the config says."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_rejuv.anchor.config import says_tied, ties, vocabulary_size
from lightning_rejuv.anchor.tensors import is_embedding, is_head
from lightning_rejuv.checkpoints.models import missing_names, skeleton_if_known
from lightning_rejuv.checkpoints.reader import Checkpoint, Reader, Rows, reading
from lightning_rejuv.names import listing

_ROWS = 1 << 10  # rows that are compared at a time


def embedding_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the token embeddings."""
    return [name for name in checkpoint.place if is_embedding(name)]


def head_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the language model heads that have a row for every token."""
    size = vocabulary_size(checkpoint.config)
    return [
        n for n, (_, e) in checkpoint.place.items() if is_head(n) and (not size or e.shape[:1] == (size,))
    ]


def stored_twice(checkpoint: Checkpoint) -> dict[str, str]:
    """Return for each head that is stored beside the embedding it is tied to the name of that embedding."""
    if says_tied(checkpoint.config) is False:
        return {}
    embeddings = {checkpoint.entry(name).shape: name for name in embedding_names(checkpoint)}
    shapes = {head: checkpoint.entry(head).shape for head in head_names(checkpoint)}
    return {head: embeddings[shape] for head, shape in shapes.items() if shape in embeddings}


def find_untied(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return a head and the embedding of its shape that differ although the config says tied; None without such."""
    if not says_tied(checkpoint.config):
        return None
    with reading(checkpoint) as (reader,):
        for head in head_names(checkpoint):
            shape = checkpoint.entry(head).shape
            alike = [name for name in embedding_names(checkpoint) if checkpoint.entry(name).shape == shape]
            if alike and not any(reader.equal(head, name) for name in alike):
                return head, alike[0]
    return None


def check_tied(checkpoint: Checkpoint) -> None:
    """Refuse a model whose config says tied although it stores a head of its own.

    Raises:
        ValueError: the message names head and embedding.
    """
    if (found := find_untied(checkpoint)) is not None:
        raise ValueError(
            f"config.json in {str(checkpoint.path)!r} says `tie_word_embeddings: true` but {found[0]!r} differs from "
            f"{found[1]!r}: what the model is depends on who loads it. Set it to false, or remove the head."
        )


def check_head(checkpoint: Checkpoint) -> None:
    """Refuse a model that has no head: its config says untied, and none is stored.

    Raises:
        ValueError: transformers would begin with random weights, which are named.
    """
    if head_names(checkpoint) or not embedding_names(checkpoint) or ties(checkpoint.config):
        return
    missing = {name for name in missing_names(checkpoint) if is_head(name)}
    if missing:
        raise ValueError(
            f"config.json in {str(checkpoint.path)!r} does not tie the head to the embedding but its files hold no "
            f"{listing(missing)}: whoever loads it gets random weights there. Set `tie_word_embeddings` to true if the "
            "model ties them; else save the model again, with its head."
        )


def tied_embedding(base: Checkpoint) -> str | None:
    """Return the embedding that a base uses as its head, by its name on disk; None if it has a head of its own."""
    embeddings = embedding_names(base)
    if head_names(base) or not embeddings or ties(base.config) is False:
        return None
    model = skeleton_if_known(base.path)
    if model is not None and not any(is_head(name) for name in model.all_tied_weights_keys):
        return None  # a model without a head
    return embeddings[0]


def check_still_tied(
    base: Checkpoint, reader: Reader, name: str, changed: Mapping[str, Rows | None], alone: bool
) -> None:
    """Refuse an adapter after which the head is no longer the embedding, since a tied model cannot hold both.

    Args:
        base: the base, which ties them.
        reader: of the base.
        name: of the embedding.
        changed: for ``"embedding"`` and ``"head"`` what gives the SFT model's rows; None if the adapter leaves
            the base's.
        alone: whether the adapter trains the head by itself, whatever the head holds by now.

    Raises:
        ValueError: the message says what to do.
    """
    entry = base.entry(name)
    sides = [changed[side] or reader.rows for side in ("embedding", "head")]
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
