"""The rows of two vocabularies: which row of the base's embedding means the same token as a row of the SFT model's."""

from __future__ import annotations

import filecmp
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv._compat import require
from lightning_rejuv.anchor.files import read_json
from lightning_rejuv.checkpoints.models import CustomCode, from_local

_VOCABULARY_TENSOR = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_tokens_per_layer|wte|embed_in|word_embeddings|tok_embeddings|embedding"
    r"|embeddings|shared|lm_head|embed_out|output|head|predictions\.decoder)\.(?:weight|bias)$"
)
# What holds a tokenizer's tokens, by name or by ending; and what adds some to them.
_TOKENS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_TOKEN_ENDINGS = (".model", ".spm", ".tiktoken", ".bpe")
_BESIDE = ("merges.txt", "added_tokens.json", "special_tokens_map.json")
_SETTINGS = "tokenizer_config.json"


def is_vocabulary_tensor(name: str, shape: tuple[int, ...], size: int | None) -> bool:
    """Tell whether a tensor has a row (or an entry) for every token, by its name and the config's size.

    >>> is_vocabulary_tensor("model.embed_tokens.weight", (32, 8), 32)
    True
    """
    return bool(_VOCABULARY_TENSOR.search(name)) and bool(shape) and (size is None or shape[0] == size)


@dataclass(frozen=True)
class RowMap:
    """For every row of the SFT model's vocabulary, the base's row of the same token.

    Attributes:
        rows: [V_sft] int64; -1 for a row that the base does not have, so that the SFT model's is kept.
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
        """True if every row is fused with the row of the same index."""
        return self.new == 0 and self.moved == 0

    def of_sft(self, base_ids: Iterable[int]) -> list[int]:
        """Return the SFT model's ids of some of the base's tokens, without those that it does not have."""
        return [row for number in base_ids for row in (self.rows == number).nonzero().flatten().tolist()]


def token_ids(directory: Path) -> dict[str, int] | None:
    """Return a tokenizer's ids by token string, added tokens included; None if there is no tokenizer.

    ``tokenizer.json`` is read as it is; other forms are loaded with transformers, from local files only.

    Raises:
        CustomCode: the tokenizer needs code of its own.
        ValueError: the tokenizer is malformed, a link of it points nowhere, or a library that it needs is not
            installed.
    """
    files = token_files(directory)
    if not files:
        return None
    if files[0] == "tokenizer.json":
        try:
            return _fast_ids(json.loads((directory / "tokenizer.json").read_bytes()))
        except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(directory / 'tokenizer.json')!r} is not a tokenizer: {error!r:.500}."
            ) from error
    transformers = require("transformers", "A tokenizer without `tokenizer.json`")
    try:
        tokenizer = from_local(transformers.AutoTokenizer, directory)
    except CustomCode:
        raise
    except Exception as error:  # whatever a missing library or a malformed file leads to
        raise ValueError(
            f"Expected to read the tokenizer's {files[0]!r} in {str(directory)!r} with transformers but loading it "
            f"ended with: {_first_sentence(error)} Install what it needs (`pip install transformers sentencepiece "
            "tiktoken protobuf`), or load the tokenizer elsewhere and save it again, which writes tokenizer.json."
        ) from error
    return dict(tokenizer.get_vocab())


def token_files(directory: Path) -> list[str]:
    """Return the files that hold a tokenizer's tokens, the one that counts first; none if there is no tokenizer.

    Raises:
        ValueError: one is a link to a file that does not exist.
    """
    others = sorted(
        path.name
        for path in directory.iterdir()
        if path.name.endswith(_TOKEN_ENDINGS) and path.name not in _TOKENS
    )
    for name in (*_TOKENS, *others, *_BESIDE, _SETTINGS):
        path = directory / name
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"Expected the tokenizer's file {name!r} in {str(directory)!r} but it is a link to "
                f"{os.readlink(path)!r}, which does not exist. Copy the file itself, or download the model again."
            )
    found = [name for name in (*_TOKENS, *others) if (directory / name).is_file()]
    return found or [_SETTINGS] * (directory / _SETTINGS).is_file()


def _first_sentence(error: Exception) -> str:
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return text if text.endswith(".") else text + "."


def _same_tokens(one: Path, two: Path) -> bool:
    """Tell whether two tokenizers have the same tokens by their files alone, for which no library is needed."""
    files = token_files(one)
    if not files or files != token_files(two):
        return False
    if files[0] == "tokenizer.json":  # it holds everything
        return _same_bytes(one / files[0], two / files[0])
    code = {path.name for directory in (one, two) for path in directory.glob("*.py")}
    same = all(_same_bytes(one / name, two / name) for name in (*files, *_BESIDE, *code))
    return same and _added(one) == _added(two)


def _same_bytes(one: Path, two: Path) -> bool:
    if one.is_file() != two.is_file():
        return False
    return not one.is_file() or filecmp.cmp(one, two, shallow=False)


def _added(directory: Path) -> Any:
    path = directory / _SETTINGS
    content = read_json(path) if path.is_file() else {}
    return [content.get(key) for key in ("added_tokens_decoder", "tokenizer_class", "auto_map")]


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

    A row beyond the tokenizer (padding) is matched with the row of the same index if that is padding in the
    base, too.

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


def match_rows(sft: Path, base: Path, sft_rows: int, base_rows: int) -> RowMap:
    """Match the rows of two checkpoints' vocabularies by their tokenizers.

    Raises:
        ValueError: the numbers of rows differ and a tokenizer is missing, so that nothing says which row is
            which token; or a tokenizer needs code of its own, and the two are not made of the same files.
    """
    if _same_tokens(sft, base):
        rows = torch.arange(sft_rows)
        rows[base_rows:] = -1
        return RowMap(rows, min(sft_rows, base_rows), max(0, sft_rows - base_rows), 0)
    try:
        ids, base_ids = token_ids(sft), token_ids(base)
    except CustomCode as error:
        raise CustomCode(
            f"The vocabularies of {str(sft)!r} and {str(base)!r} cannot be compared: {error} "
            "Fusion needs both vocabularies as `tokenizer.json`, or the same tokenizer files in both."
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


def runs(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """Split a row map into runs of consecutive base rows: (first place, first base row, length)."""
    values = index.tolist()
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[stop - 1] + 1 or values[stop - 1] < 0:
            if values[start] >= 0:
                yield start, values[start], stop - start
            start = stop
