"""Which tensors of base and SFT model are fused with each other, and whether the two models may be fused at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lightning_rejuv.anchor.config import vocabulary_size
from lightning_rejuv.anchor.files import CONFIG
from lightning_rejuv.anchor.tensors import is_head, not_of_the_model
from lightning_rejuv.checkpoints.names import CommonNames, common_names
from lightning_rejuv.checkpoints.reader import (
    Checkpoint,
    Reader,
    check_fusable,
    left_out,
    open_checkpoint,
    pieces,
    reading,
)
from lightning_rejuv.checkpoints.tying import check_head, check_tied, embedding_names, head_names
from lightning_rejuv.checkpoints.vocabulary import RowMap, is_vocabulary_tensor, match_rows, runs
from lightning_rejuv.config import PathLike
from lightning_rejuv.ops.blocked import one_thread

_PIECE = 1 << 18  # weights that are compared at a time
# Settings in which two models may differ although all shapes are equal, and weights then mean something else.
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


@dataclass(frozen=True)
class Pair:
    """One tensor of the output.

    Attributes:
        name: its name in the SFT model, and in the output's files.
        base: the base tensor's name in the base's files; None if the SFT model's tensor is copied.
        rows: how its rows are matched; None if row i is fused with row i.
    """

    name: str
    base: str | None
    rows: RowMap | None = None


@dataclass(frozen=True)
class Pairing:
    """An SFT model and its base, and which tensors of theirs belong together.

    Attributes:
        pairs: all tensors of the output, by name.
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


def open_both(sft: PathLike, base: PathLike) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Open an SFT model and its base.

    Returns:
        The two, and warnings: settings that differ, and weight files that were not read.

    Raises:
        FileNotFoundError: a directory or a file in it does not exist.
        ValueError: a checkpoint is malformed or quantised, or the two are of different architectures.
    """
    opened = open_checkpoint(sft, "SFT model"), open_checkpoint(base, "base")
    for checkpoint, role in zip(opened, ("SFT model", "base"), strict=True):
        check_fusable(checkpoint, role)
    warnings = check_same_architecture(*opened)
    for checkpoint, role in zip(opened, ("SFT model", "base"), strict=True):
        warnings += left_out(checkpoint, role)
    return *opened, warnings


def pair_up(sft: Checkpoint, base: Checkpoint) -> Pairing:
    """Match every tensor of the SFT model with the base's.

    Tensors are matched by their names on disk, in which one prefix may differ (a base saved without its head's
    wrapper); else by what the names become once transformers has loaded them. Integer and boolean tensors, and
    constants that only some releases store, come from the SFT model. A head that only one of the two stores is the
    other's embedding if that is tied. An SFT model under names that do not load (``module.…``) is renamed.

    Raises:
        ValueError: names or shapes differ; the config says tied beside a head of its own, or untied beside none; the
            SFT model ties what the base does not; vocabularies differ and a tokenizer is missing.
    """
    for checkpoint in (sft, base):
        check_head(checkpoint)
    common = common_names(sft, base)
    sft, base = common.sft, common.base
    check_tied(sft)
    matched, unused = _match(common)
    _check_unused(common, unused)
    rows = _match_vocabularies(sft, base, matched)
    pairs = {}
    for name, base_name in matched.items():
        vocabulary = rows is not None and is_vocabulary_tensor(name, sft.entry(name).shape, len(rows.rows))
        _check_shape(sft, base, name, base_name, vocabulary)
        pairs[name] = Pair(name, base_name, rows if vocabulary and rows and not rows.identity else None)
    return Pairing(pairs, rows, tuple(unused), sft, base, common.warnings)


def check_same_architecture(sft: Checkpoint, base: Checkpoint) -> list[str]:
    """Refuse a base of another architecture.

    Returns:
        Warnings: settings that fine-tuning may change, but that change what weights mean.

    Raises:
        ValueError: the message has the key of ``config.json`` and both values.
    """
    warnings = []
    for path, sft_part, base_part in _parts(sft.config, base.config):
        for key in _SAME:
            if _contradict(sft_part.get(key), base_part.get(key)):
                raise ValueError(
                    f"Expected the base to have the SFT model's architecture but `{path}{key}` in {CONFIG} is "
                    f"{sft_part[key]!r:.200} in {str(sft.path)!r} and {base_part[key]!r:.200} in {str(base.path)!r}. "
                    "Pass the checkpoint that SFT started from."
                )
        for key in _BETTER_SAME:
            if _contradict(sft_part.get(key), base_part.get(key)):
                warnings.append(
                    f"`{path}{key}` is {sft_part[key]!r:.200} in the SFT model and {base_part[key]!r:.200} in the base"
                )
    return warnings


def check_differ(pairing: Pairing) -> None:
    """Refuse a base that equals the SFT model in every tensor, as :func:`lightning_rejuv.rejuvenate` does.

    Two models that differ are told apart by a few pieces: the first one of every tensor, the small tensors first.
    Everything is read only if the models are equal, and nothing if their files are the same.

    Raises:
        ValueError: they are equal.
    """
    sft, base = pairing.sft, pairing.base
    fused = [pair for pair in pairing.pairs.values() if pair.base is not None]
    same_files = sft.shards.keys() == base.shards.keys() and all(
        os.path.samefile(sft.path / file, base.path / file) for file in sft.shards
    )
    if not same_files:
        fused.sort(key=lambda pair: sft.entry(pair.name).numel)
        with one_thread(), reading(sft, base) as readers:
            for begin in (True, False):
                if any(_differs(pairing, pair, *readers, begin=begin) for pair in fused):
                    return
    raise ValueError(
        f"The base {str(base.path)!r} equals the SFT model {str(sft.path)!r} in every tensor: there is nothing to "
        "pull back. Pass the checkpoint that SFT started from."
    )


def _match(common: CommonNames) -> tuple[dict[str, str | None], list[str]]:
    """Return for every tensor of the SFT model the base's name, or None; and the base's names that none has."""
    sft, base = common.sft, common.base
    matched: dict[str, str | None] = dict.fromkeys(sft.place)
    for name, aliases in common.wanted.items():
        present = [common.in_base[alias] for alias in aliases if alias in common.in_base]
        if present and base.entry(present[0]).dtype.is_floating_point:
            matched[name] = present[0]
    used = {*matched.values(), *(common.in_base.get(name) for name in common.of_sft.values())}
    return matched, [name for name in common.in_base.values() if name not in used]


def _check_unused(common: CommonNames, unused: list[str]) -> None:
    """Refuse tensors that only the base has, unless they are no part of the model that is fused."""
    base, names = common.base, {name: shared for shared, name in common.in_base.items()}
    fine = not_of_the_model([names[name] for name in unused], common.of_sft.values(), base.config)
    with reading(base) as (reader,):
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


def _match_vocabularies(sft: Checkpoint, base: Checkpoint, matched: dict[str, str | None]) -> RowMap | None:
    size, base_size = vocabulary_size(sft.config), vocabulary_size(base.config)
    for name, base_name in matched.items():
        if base_name is None or not is_vocabulary_tensor(name, sft.entry(name).shape, size):
            continue
        rows, base_rows = sft.entry(name).shape[0], base.entry(base_name).shape[:1]
        if base_size is None or base_rows == (base_size,):
            return match_rows(sft.path, base.path, rows, *base_rows)
    return None


def _check_shape(
    sft: Checkpoint, base: Checkpoint, name: str, base_name: str | None, vocabulary: bool
) -> None:
    if base_name is None:
        return
    shape, base_shape = sft.entry(name).shape, base.entry(base_name).shape
    if shape[int(vocabulary) :] != base_shape[int(vocabulary) :] or len(shape) != len(base_shape):
        raise ValueError(
            f"Expected the base's tensor {base_name!r} to have shape {shape} as in {str(sft.path)!r} but it has "
            f"{base_shape} in {str(base.path)!r}. Pass the checkpoint that SFT started from."
        )


def _parts(
    sft: dict[str, Any], base: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Go through two configs and the configs of their parts: the path of keys, and both."""
    yield path, sft, base
    for key, value in sft.items():
        other = base.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and "model_type" in value:
            yield from _parts(value, other, f"{path}{key}.")


def _contradict(value: Any, base_value: Any) -> bool:
    return value is not None and base_value is not None and value != base_value


def _differs(pairing: Pairing, pair: Pair, reader: Reader, base_reader: Reader, *, begin: bool) -> bool:
    """Tell whether two tensors differ: in their first piece, or in the others."""
    assert pair.base is not None
    entry = pairing.sft.entry(pair.name)
    base_entry = pairing.base.entry(pair.base)
    ranges = list(pieces(entry.shape, _PIECE))
    for start, stop in ranges[:1] if begin else ranges[1:]:
        values = reader.rows(entry, start, stop)
        if pair.rows is None:
            base_values = base_reader.rows(base_entry, start, stop)
        else:
            index = pair.rows.rows[start:stop]
            values = values[index >= 0]
            found = [base_reader.rows(base_entry, first, first + n) for _, first, n in runs(index)]
            base_values = torch.cat([values.new_zeros(0, values.shape[1]), *found])
        if bool((values.double() != base_values.double()).any()):
            return True
    return False
