"""Which row of the base's embedding means the same token as a row of the SFT model's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.handoff.checkpoint import read_json
from lightning_rejuv.handoff.models import CustomCode, from_local
from lightning_rejuv.handoff.provenance import hash_file

_VOCABULARY_TENSOR = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_tokens_per_layer|wte|embed_in|word_embeddings|tok_embeddings|embedding"
    r"|embeddings|shared|lm_head|embed_out|output|head|predictions\.decoder)\.(?:weight|bias)$"
)
_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "tokenizer_config.json",
)
# Everything that says which token has which id: vocabularies, merges, code.
_TOKENIZER_FILE = re.compile(
    r"\.(?:model|tiktoken|vocab|bpe|py)$|^(?:vocab|merges|tokenizer\.|spiece|added_tokens|special_tokens)"
)
_NAMES_TOKENS = ("added_tokens_decoder", "additional_special_tokens", "tokenizer_class", "auto_map")


def is_vocabulary_tensor(name: str, shape: tuple[int, ...], size: int | None) -> bool:
    """Whether a tensor has a row (or an entry) for every token: by its name and the config's size.

    >>> is_vocabulary_tensor("model.embed_tokens.weight", (32, 8), 32)
    True
    """
    return bool(_VOCABULARY_TENSOR.search(name)) and bool(shape) and (size is None or shape[0] == size)


@dataclass(frozen=True)
class RowMap:
    """For every row of the SFT model's vocabulary, the base's row of the same token.

    Attributes:
        rows: [V_sft] int64; -1 where the base has none and the SFT model's row is kept.
        shared: number of rows that are fused.
        new: number of rows that only the SFT model has.
        moved: number of shared rows whose index differs.
    """

    rows: Tensor
    shared: int
    new: int
    moved: int

    @property
    def identity(self) -> bool:
        """Whether every row is fused with the row of the same index."""
        return self.new == 0 and self.moved == 0


def token_ids(directory: Path) -> dict[str, int] | None:
    """Return a tokenizer's ids by token string, added tokens included; None where there is no tokenizer.

    ``tokenizer.json`` is read as it is; other forms are loaded with transformers, from local files only.

    Raises:
        CustomCode: the tokenizer needs code of its own.
        ValueError: the tokenizer is malformed.
    """
    if (directory / "tokenizer.json").is_file():
        try:
            return _fast_ids(json.loads((directory / "tokenizer.json").read_bytes()))
        except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(directory / 'tokenizer.json')!r} is not a tokenizer: {error!r:.500}."
            ) from error
    if not any((directory / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    return dict(from_local(AutoTokenizer, directory).get_vocab())


def _fast_ids(content: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the place
        ids = {str(token): number for number, (token, _) in enumerate(vocabulary)}
    else:
        ids = {str(token): int(number) for token, number in vocabulary.items()}
    ids.update({str(token["content"]): int(token["id"]) for token in content.get("added_tokens", [])})
    if ids and not 0 <= min(ids.values()) <= max(ids.values()) < 1 << 31:
        raise ValueError("its ids are not from 0 to 2**31")
    return ids


def row_map(sft: Mapping[str, int], base: Mapping[str, int], sft_rows: int, base_rows: int) -> RowMap:
    """Match the rows of two vocabularies by token string.

    A row beyond the tokenizer (padding) is matched with the row of the same index where that is padding in
    the base, too.

    Args:
        sft: the SFT tokenizer's ids.
        base: the base tokenizer's ids.
        sft_rows: rows of the SFT model's embedding.
        base_rows: rows of the base's.

    >>> row_map({"a": 0, "c": 1, "b": 2}, {"a": 0, "b": 1}, 4, 4).rows
    tensor([ 0, -1,  1,  3])
    """
    rows = torch.arange(sft_rows)
    used_in_sft = torch.zeros(sft_rows, dtype=torch.bool)
    used_in_base = torch.zeros(max(sft_rows, base_rows), dtype=torch.bool)
    used_in_base[[i for i in base.values() if 0 <= i < base_rows]] = True
    for token, row in sft.items():
        if 0 <= row < sft_rows:
            used_in_sft[row] = True
            rows[row] = base.get(token, -1)
    rows[(rows >= base_rows) | (~used_in_sft & used_in_base[:sft_rows])] = -1
    shared = rows >= 0
    moved = shared & (rows != torch.arange(sft_rows))
    return RowMap(rows, int(shared.sum()), int((~shared).sum()), int(moved.sum()))


def _same_tokenizer(first: Path, second: Path) -> bool:
    """Whether two tokenizers are made of the same files, byte for byte; their settings may differ."""
    found = []
    for directory in (first, second):
        names = {
            path.name for path in directory.iterdir() if _TOKENIZER_FILE.search(path.name) and path.is_file()
        }
        found.append({name: hash_file(directory / name) for name in names})
        settings = directory / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        found[-1] |= {key: json.dumps(config.get(key), sort_keys=True) for key in _NAMES_TOKENS}
    return found[0] == found[1]


def match_rows(sft: Path, base: Path, sft_rows: int, base_rows: int) -> RowMap:
    """Match the rows of two checkpoints' vocabularies by their tokenizers.

    Raises:
        ValueError: the numbers of rows differ and a tokenizer is missing, so that nothing says which row is
            which token; or a tokenizer needs code of its own, and the two are not made of the same files.
    """
    try:
        ids, base_ids = token_ids(sft), token_ids(base)
    except CustomCode as error:
        if sft_rows == base_rows and _same_tokenizer(sft, base):
            return RowMap(torch.arange(sft_rows), sft_rows, 0, 0)
        raise CustomCode(
            f"The vocabularies of {str(sft)!r} and {str(base)!r} cannot be compared: {error} "
            "Fusion needs both vocabularies as `tokenizer.json`, or the same tokenizer files and as many rows in both."
        ) from error
    if ids is None or base_ids is None:
        if sft_rows != base_rows:
            where = str(sft if ids is None else base)
            raise ValueError(
                f"The SFT model has {sft_rows} vocabulary rows and the base {base_rows}, but there is no "
                f"tokenizer in {where!r} to match them by token string. Save the tokenizer beside the model."
            )
        return RowMap(torch.arange(sft_rows), sft_rows, 0, 0)
    return row_map(ids, base_ids, sft_rows, base_rows)
