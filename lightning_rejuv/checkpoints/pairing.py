"""Every tensor of the SFT model on disk, with the base's tensor that it is fused with."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rejuv.anchor.config import says_tied, ties, vocabulary_size
from lightning_rejuv.anchor.tensors import is_embedding, is_head, not_of_the_model
from lightning_rejuv.checkpoints.checkpoint import Checkpoint, Reader, reading
from lightning_rejuv.checkpoints.common_names import Common, common_names
from lightning_rejuv.checkpoints.skeleton import missing_names
from lightning_rejuv.checkpoints.vocabulary import RowMap, is_vocabulary_tensor, match_rows
from lightning_rejuv.names import listing


@dataclass(frozen=True)
class Pair:
    """One tensor of the output.

    Attributes:
        name: its name in the SFT model, and in the output's files.
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
        sft: the SFT model, under the names that the output has.
        base: the base, with tensors that are put into the SFT model's layout when they are read.
        warnings: what was renamed, and why.
    """

    pairs: dict[str, Pair]
    rows: RowMap | None
    unused: tuple[str, ...]
    sft: Checkpoint
    base: Checkpoint
    warnings: tuple[str, ...] = ()


def pair_up(sft: Checkpoint, base: Checkpoint) -> Pairing:
    """Match every tensor of the SFT model with the base's.

    By name on disk, where one prefix may differ (a base saved without its head's wrapper); else by what the names
    become once transformers has loaded them. Integer and boolean tensors, and constants that only some releases
    store, come from the SFT model. A head that only one of the two stores is the other's embedding where that is
    tied. An SFT model under names that do not load (``module.…``) is renamed.

    Raises:
        ValueError: names or shapes differ; the config says tied beside a head of its own, or untied beside none; the
            SFT model ties what the base does not; vocabularies differ and a tokenizer is missing.
    """
    for checkpoint in (sft, base):
        check_head(checkpoint)
    common = common_names(sft, base)
    sft, base = common.sft, common.base
    with reading(sft, base) as (ours, theirs):
        _check_tying(sft, ours)
        matched, unused = _names(common)
        _check_unused(common, theirs, unused)
    rows = _rows(sft, base, matched)
    pairs = {}
    for name, other in matched.items():
        vocabulary = rows is not None and is_vocabulary_tensor(name, sft.entry(name).shape, len(rows.rows))
        _check_shape(sft, base, name, other, vocabulary)
        pairs[name] = Pair(name, other, rows if vocabulary and rows and not rows.identity else None)
    return Pairing(pairs, rows, tuple(unused), sft, base, common.warnings)


def embedding_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the token embeddings."""
    return [name for name in checkpoint.place if is_embedding(name)]


def head_names(checkpoint: Checkpoint) -> list[str]:
    """Names of language model heads that have a row for every token."""
    size = vocabulary_size(checkpoint.config)
    return [
        n for n, (_, e) in checkpoint.place.items() if is_head(n) and (not size or e.shape[:1] == (size,))
    ]


def check_head(checkpoint: Checkpoint) -> None:
    """Refuse a model whose head is nowhere: its config says untied, and none is stored.

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


def _names(common: Common) -> tuple[dict[str, str | None], list[str]]:
    """For every tensor of the SFT model the base's name, or None; and the base's names that none has."""
    sft, base = common.sft, common.base
    matched: dict[str, str | None] = dict.fromkeys(sft.place)
    for name, aliases in common.wanted.items():
        present = [common.theirs[alias] for alias in aliases if alias in common.theirs]
        if present and base.entry(present[0]).dtype.is_floating_point:
            matched[name] = present[0]
    used = {*matched.values(), *(common.theirs.get(name) for name in common.ours.values())}
    return matched, [name for name in common.theirs.values() if name not in used]


def _check_unused(common: Common, reader: Reader, unused: list[str]) -> None:
    """Tensors of the base alone are fine where they are not part of the model that is fused."""
    base, names = common.base, {there: name for name, there in common.theirs.items()}
    fine = not_of_the_model([names[name] for name in unused], common.ours.values(), base.config)
    for name in unused:
        if names[name] in fine:
            continue
        if is_head(name) and any(reader.equal(name, other) for other in embedding_names(base)):
            continue
        hint = "Pass the checkpoint that SFT started from."
        if is_head(name) and not head_names(common.sft):
            hint = (
                "The SFT model ties its head to its embedding and the base does not, so that no tied model "
                "is their fusion: save the SFT model with `tie_word_embeddings=False`."
            )
        raise ValueError(
            f"The base {str(base.path)!r} holds the tensor {name!r} that the SFT model does not have. {hint}"
        )


def _check_tying(sft: Checkpoint, reader: Reader) -> None:
    if not says_tied(sft.config):
        return
    for head in head_names(sft):
        same_shape = [n for n in embedding_names(sft) if sft.entry(n).shape == sft.entry(head).shape]
        if same_shape and not any(reader.equal(head, name) for name in same_shape):
            raise ValueError(
                f"config.json in {str(sft.path)!r} says `tie_word_embeddings: true` but {head!r} differs "
                f"from {same_shape[0]!r}: what the model is depends on who loads it. Set it to false, or remove "
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
