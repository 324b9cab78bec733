"""Every tensor of the SFT model on disk, with the base's tensor that it is fused with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_rejuv.handoff.checkpoint import Checkpoint, Reader, reading
from lightning_rejuv.handoff.refusals import configs, says_tied, vocabulary_size
from lightning_rejuv.handoff.vocabulary import RowMap, is_vocabulary_tensor, match_rows
from lightning_rejuv.names import bridge, listing

_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embeddings?|shared)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|head)\.weight$")
# Constants that older releases stored and newer ones compute.
_CONSTANT = re.compile(
    r"(?:\.|^)(?:attn|attention|self_attn|self_attention)\.(?:bias|masked_bias)$"
    r"|(?:\.|^)(?:inv_freq|embed_positions\.weights|position_ids|masked_bias|attn_bias)$"
)
_MULTI_TOKEN_PREDICTION = re.compile(r"(?:^|\.)mtp(?:\.|_)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Pair:
    """One tensor of the output.

    Attributes:
        name: its name in the SFT model's files, and in the output's.
        base: the base tensor's name in the base's files; None where the SFT model's is copied.
        rows: how its rows are matched; None where row i is fused with row i.
    """

    name: str
    base: str | None
    rows: RowMap | None = None


@dataclass(frozen=True)
class Pairing:
    """All tensors of the output, by name, and what deserves to be said about how they were matched.

    Attributes:
        pairs: by name.
        rows: how the vocabularies were matched.
        unused: tensors of the base that the SFT model does not have.
    """

    pairs: dict[str, Pair]
    rows: RowMap | None
    unused: tuple[str, ...]


def pair_up(sft: Checkpoint, base: Checkpoint) -> Pairing:
    """Match every tensor of the SFT model with the base's, by name on disk.

    One prefix may differ (a base saved without its head's wrapper). Integer and boolean tensors, and
    constants that only some releases store, come from the SFT model. A head that only one of the two stores
    is the other's embedding where that is tied.

    Raises:
        ValueError: names or shapes differ; the config says tied beside a head of its own; the SFT model
            ties what the base does not; vocabularies differ and a tokenizer is missing.
    """
    with reading(sft, base) as (ours, theirs):
        _check_tying(sft, ours)
        matched, unused = _names(sft, base)
        _check_unused(sft, base, theirs, unused)
    rows = _rows(sft, base, matched)
    pairs = {}
    for name, other in matched.items():
        vocabulary = rows is not None and is_vocabulary_tensor(name, sft.entry(name).shape, len(rows.rows))
        _check_shape(sft, base, name, other, vocabulary)
        pairs[name] = Pair(name, other, rows if vocabulary and rows and not rows.identity else None)
    return Pairing(pairs, rows, tuple(unused))


def embedding_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the token embeddings."""
    return [name for name in checkpoint.place if _EMBEDDING.search(name)]


def head_names(checkpoint: Checkpoint) -> list[str]:
    """Names of language model heads that have a row for every token."""
    size = vocabulary_size(checkpoint.config)
    return [
        n
        for n, (_, e) in checkpoint.place.items()
        if _HEAD.search(n) and (not size or e.shape[:1] == (size,))
    ]


def _names(sft: Checkpoint, base: Checkpoint) -> tuple[dict[str, str | None], list[str]]:
    floating = [n for n, (_, e) in sft.place.items() if e.dtype.is_floating_point]
    embeddings = embedding_names(sft)
    wanted = {name: [name, *(embeddings if _HEAD.search(name) else [])] for name in floating}
    needed = [aliases for name, aliases in wanted.items() if not _CONSTANT.search(name)]
    rename = bridge(needed, base.place.keys())
    if rename is None:
        ours, theirs = set(floating), set(base.place)
        raise ValueError(
            f"The SFT model and the base do not hold the same tensors. Only in {str(sft.path)!r}: "
            f"{listing(ours - theirs)}. Only in {str(base.path)!r}: {listing(theirs - ours)}. Pass the "
            "checkpoint that SFT started from; merge adapters and remove added heads first."
        )
    matched: dict[str, str | None] = dict.fromkeys(sft.place)
    for name, aliases in wanted.items():
        present = [rename(alias) for alias in aliases if rename(alias) in base.place]
        if present and base.entry(present[0]).dtype.is_floating_point:
            matched[name] = present[0]
    used = {*matched.values(), *(rename(name) for name in sft.place)}
    return matched, [name for name in base.place if name not in used]


def _check_unused(sft: Checkpoint, base: Checkpoint, reader: Reader, unused: list[str]) -> None:
    """Tensors of the base alone are fine where they are not part of the model that is fused."""
    layers = [int(found.group(1)) for name in sft.place if (found := _LAYER.search(name))]
    for name in unused:
        found = _LAYER.search(name)
        beyond = bool(found and layers and int(found.group(1)) > max(layers))
        if _CONSTANT.search(name) or _MULTI_TOKEN_PREDICTION.search(name):
            continue
        if beyond and _one_more_layer(base, max(layers)):
            continue
        if _HEAD.search(name) and any(reader.equal(name, other) for other in embedding_names(base)):
            continue
        hint = "Pass the checkpoint that SFT started from."
        if _HEAD.search(name) and not head_names(sft):
            hint = (
                "The SFT model ties its head to its embedding and the base does not, so that no tied model "
                "is their fusion: save the SFT model with `tie_word_embeddings=False`."
            )
        raise ValueError(
            f"The base {str(base.path)!r} holds the tensor {name!r} that the SFT model does not have. {hint}"
        )


def _one_more_layer(base: Checkpoint, last: int) -> bool:
    """DeepSeek stores its multi-token-prediction module as a layer after the last; Transformers drops it."""
    return any(
        bool(config.get("num_nextn_predict_layers")) and config.get("num_hidden_layers") == last + 1
        for config in configs(base.config)
    )


def _check_tying(sft: Checkpoint, reader: Reader) -> None:
    if not says_tied(sft.config):
        return
    for head in head_names(sft):
        same_shape = [n for n in embedding_names(sft) if sft.entry(n).shape == sft.entry(head).shape]
        if same_shape and not any(reader.equal(head, name) for name in same_shape):
            raise ValueError(
                f"config.json in {str(sft.path)!r} says `tie_word_embeddings: true` but {head!r} differs "
                f"from {same_shape[0]!r}: what the model is depends on who loads it. Set it to false, or "
                "remove "
                "the head."
            )


def _rows(sft: Checkpoint, base: Checkpoint, matched: dict[str, str | None]) -> RowMap | None:
    ours, theirs = vocabulary_size(sft.config), vocabulary_size(base.config)
    for name, other in matched.items():
        if other is None or not is_vocabulary_tensor(name, sft.entry(name).shape, ours):
            continue
        rows, base_rows = sft.entry(name).shape[0], base.entry(other).shape[:1]
        if theirs is None or base_rows == (theirs,):
            return match_rows(sft.path, base.path, rows, *base_rows)
    return None


def _check_shape(sft: Checkpoint, base: Checkpoint, name: str, other: str | None, vocabulary: bool) -> None:
    if other is None:
        return
    ours, theirs = sft.entry(name).shape, base.entry(other).shape
    if ours[int(vocabulary) :] != theirs[int(vocabulary) :] or len(ours) != len(theirs):
        raise ValueError(
            f"Expected the base's tensor {other!r} to have shape {ours} as in {str(sft.path)!r} but it has "
            f"{theirs} in {str(base.path)!r}. Pass the checkpoint that SFT started from."
        )
