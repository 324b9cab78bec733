"""Calibration data from a JSONL file: prompts and responses, tokenised as the SFT model saw them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_rejuv.anchor.config import end_tokens
from lightning_rejuv.anchor.files import GENERATION
from lightning_rejuv.calibration.batches import IGNORED, in_parts
from lightning_rejuv.checkpoints.chat_template import render

_FORM = '{"prompt": TEXT, "response": TEXT} or {"messages": [{"role": …, "content": …}, …]}'
_BATCH_TOKENS = 32768
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
# Files that hold tables or text in another form, by their first bytes.
_OTHER_FORMS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x28\xb5\x2f\xfd": "a file compressed with Zstandard",
    b"BZh": "a file compressed with bzip2",
    b"\xfd7zXZ": "a file compressed with xz",
    b"PK\x03\x04": "a ZIP archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}

Prompt = tuple[int, ...]
"""The tokens before a response."""


@dataclass(frozen=True)
class Dialogue:
    """One line: the text before the response, and the response.

    Attributes:
        prompt: the text before the response.
        response: the text of the response, with the token that ends it.
        rendered: whether a chat template made the text, so that it holds all of its special tokens.
        where: how messages name the line.
    """

    prompt: str
    response: str
    rendered: bool = False
    where: str = field(default="the pair", compare=False)


@dataclass(frozen=True)
class Calibration:
    """Calibration data of a file.

    Attributes:
        batches: as a causal language model takes them, see :func:`tokenize`.
        prompts: the text of each prompt by its tokens: of a plain pair as it stands in the line, and of several with
            the same tokens in the first; of messages as the tokenizer decodes what was rendered.
        tokenizer: what they were made with.
    """

    batches: list[dict[str, Tensor]]
    prompts: Mapping[Prompt, str]
    tokenizer: Any


def read_calibration(
    path: Path, tokenizer: Any, context: int | None = None, vocabulary: int | None = None
) -> Calibration:
    """Read and tokenise a JSONL file.

    Raises:
        ValueError: as :func:`read_dialogues` and :func:`tokenize`.
        OSError: the file cannot be read.
    """
    dialogues = read_dialogues(path, tokenizer)
    batches = tokenize(dialogues, tokenizer, context=context, vocabulary=vocabulary)
    rows = (row for batch in batches for row in zip(batch["input_ids"], batch["labels"], strict=True))
    prompts: dict[Prompt, str] = {}
    for dialogue, (ids, labels) in zip(dialogues, rows, strict=True):
        prompt = prompt_tokens(ids, labels)
        # A model has to be given a token: if there is none before the response, its first one is the prompt.
        decoded = dialogue.rendered or labels[0] != IGNORED
        prompts.setdefault(prompt, tokenizer.decode(list(prompt)) if decoded else dialogue.prompt)
    return Calibration(batches, prompts, tokenizer)


def prompt_tokens(ids: Tensor, labels: Tensor) -> Prompt:
    """Return the tokens of one row that stand before its response, at least one.

    >>> prompt_tokens(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, IGNORED, 7]))
    (5, 6)
    """
    return tuple(ids[: int((labels[1:] != IGNORED).int().argmax()) + 1].tolist())


def read_dialogues(path: Path, tokenizer: Any) -> list[Dialogue]:
    r"""Read and render a JSONL file.

    ``{"prompt", "response"}`` is taken as it is. The tokenizer's EOS is appended to a response that does not
    end with it, with another special token or with an EOS of ``generation_config.json`` beside the tokenizer
    (``<|im_end|>``, say, perhaps with a line break after it).

    In ``{"messages"}`` the last message has to be the assistant's: it is the response, and all of it is rendered
    with the tokenizer's own chat template. The template is given ``tools`` (a list, or JSON text of one), every
    other key of the line that it reads (``documents``, ``enable_thinking``), and ``chat_template_kwargs``.
    Tools, and calls of tools, that it does not read are refused, and so are lists of parts that it writes out as
    Python does.

    Raises:
        ValueError: a line is not of this form, with its number; or the file holds none.
        OSError: the file cannot be read.
    """
    dialogues = [_dialogue(content, tokenizer, where) for where, content in read_lines(path)]
    if not dialogues:
        raise ValueError(f"Expected lines of the form {_FORM} in {str(path)!r} but the file is empty.")
    return dialogues


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    r"""Yield the lines of a JSONL file, plain or gzip: the place of each value, for messages, and the value.

    A line ends at ``\n`` or ``\r\n`` and nowhere else: U+2028, U+0085 and their like are characters of a string,
    and so is a control character that is not escaped. Blank lines are passed over, and so is a byte order mark
    before the first line.

    Raises:
        ValueError: a line is no JSON or no UTF-8, with its number; or the file has another form.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.peek(8)[:8]  # a pipe (`<(head sft.jsonl)`) cannot be rewound
        for first, form in _OTHER_FORMS.items():
            if start.startswith(first):
                raise ValueError(
                    f"Expected {str(path)!r} to be JSONL (UTF-8, one JSON object a line, may be gzip) but it is "
                    f"{form}. Convert it."
                )
        if start.startswith(_GZIP):
            yield from _unpacked_lines(path, file)
        else:
            yield from _lines(path, file)


def _unpacked_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(file) as unpacked:
            yield from _lines(path, unpacked)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {str(path)!r} to be a whole gzip file but it is damaged: {error}."
        ) from error


def _lines(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            yield where, json.loads(line.decode("utf-8"), strict=False)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Expected {where} to be UTF-8 but its byte {error.start} is not ({error.reason})."
            ) from error
        except (ValueError, RecursionError) as error:
            hint = " The file holds one JSON array; write one object a line." if line.strip() == b"[" else ""
            raise ValueError(f"Expected {where} to be JSON: {error}.{hint}") from error


def tokenize(
    dialogues: Sequence[Dialogue],
    tokenizer: Any,
    batch_size: int = 8,
    context: int | None = None,
    vocabulary: int | None = None,
) -> list[dict[str, Tensor]]:
    """Return batches as a causal language model takes them, padded on the right; no pair is cut.

    Args:
        dialogues: the pairs.
        tokenizer: the SFT model's.
        batch_size: pairs in a batch, at most: fewer if they are long, so that none has more than 32,768 tokens
            beyond a single pair.
        context: number of positions that the model has, if it is limited.
        vocabulary: number of tokens that it has an embedding for, if that is known.

    Raises:
        ValueError: a pair has no response, is one token alone, is longer than the model's context, or has a token that
            the model has no embedding for; with its line.
    """
    pairs = []
    for dialogue in dialogues:
        ids, response = _token_ids(dialogue, tokenizer)
        if not response:
            raise ValueError(
                f"Expected {dialogue.where} to have a response but it has {len(ids)} prompt tokens and no response "
                "token. Leave it out."
            )
        if len(ids) + len(response) < 2:
            raise ValueError(
                f"Expected {dialogue.where} to have a token before its response, which is one token alone, but it has "
                "none: a model says nothing of the first one. Leave it out."
            )
        if context is not None and len(ids) + len(response) > context:
            raise ValueError(
                f"Expected {dialogue.where} to fit into the model's {context} positions but it has "
                f"{len(ids) + len(response)} tokens, {len(ids)} of the prompt and {len(response)} of the response. "
                "Shorten it, or leave it out."
            )
        if vocabulary is not None and (highest := max(ids + response)) >= vocabulary:
            raise ValueError(
                f"Expected {dialogue.where} to hold tokens of the SFT model's {vocabulary} alone but its tokenizer "
                f"makes {tokenizer.convert_ids_to_tokens(highest)!r} ({highest}) of it. Save the tokenizer of "
                "these weights beside them, or resize the model's embeddings to the tokenizer."
            )
        pairs.append((ids, response))
    padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    parts = in_parts(pairs, _BATCH_TOKENS, lambda pair: len(pair[0]) + len(pair[1]), batch_size)
    return [_batch(part, padding) for part in parts]


def _token_ids(dialogue: Dialogue, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the response, as in one text of both: ``<bos> prompt response``."""
    prompt = _plain(dialogue.prompt, tokenizer)
    response = (
        _continuation(dialogue.response, tokenizer)
        if dialogue.prompt
        else _plain(dialogue.response, tokenizer)
    )
    # If a token is unknown, a word that spans both parts could disappear, so that they have to stay apart.
    whole = _plain(dialogue.prompt + dialogue.response, tokenizer)
    if whole[: len(prompt)] == prompt and tokenizer.unk_token_id not in whole:
        response = whole[len(prompt) :]
    if dialogue.rendered or _starts_special(dialogue.prompt, tokenizer):
        return prompt, response
    return _prefix(dialogue.prompt or dialogue.response, tokenizer) + prompt, response


def _plain(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text within another, without the space that SentencePiece puts before every text."""
    for before in ("\n", ":"):
        start, whole = _plain(before, tokenizer), _plain(before + text, tokenizer)
        if start and whole[: len(start)] == start and tokenizer.unk_token_id not in start:
            return whole[len(start) :]
    return _plain(text, tokenizer)


def _prefix(text: str, tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text; those that it puts after it end no prompt."""
    plain = _plain(text, tokenizer)
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    special = set(tokenizer.all_special_ids)
    return whole[: next((n for n, token in enumerate(whole) if token not in special), 0)]


def _starts_special(text: str, tokenizer: Any) -> bool:
    return any(text.lstrip().startswith(token) for token in tokenizer.all_special_tokens)


def _batch(pairs: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.full((len(pairs), width), padding)
    labels = torch.full((len(pairs), width), IGNORED)
    mask = torch.zeros((len(pairs), width), dtype=torch.int64)
    for row, (prompt, response) in enumerate(pairs):
        start, stop = len(prompt), len(prompt) + len(response)
        ids[row, :stop] = torch.tensor(prompt + response)
        labels[row, start:stop] = torch.tensor(response)
        mask[row, :stop] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _dialogue(content: Any, tokenizer: Any, where: str) -> Dialogue:
    if isinstance(content, dict) and "messages" in content:
        prompt, response = render(content, tokenizer, where)
        return Dialogue(prompt, response, rendered=True, where=where)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), str) for k in ("prompt", "response")
    ):
        raise ValueError(f"Expected {where} to be of the form {_FORM} but got {content!r:.200}.")
    return Dialogue(content["prompt"], _ended(content["response"], tokenizer), where=where)


def _ended(response: str, tokenizer: Any) -> str:
    """Return the response with a token that ends it: its own, else the one that the model ends with."""
    generation = _generation_ends(tokenizer)
    # These begin, fill or stand for something, and end nothing, unless one is the EOS as well (GPT-2).
    others = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.mask_token}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = ({*tokenizer.all_special_tokens, *added} - others) | {tokenizer.eos_token, *generation}
    if response.rstrip().endswith(tuple(end for end in ends if end)):
        return response
    return response + (tokenizer.eos_token or next(iter(generation), "") or _suffix(response, tokenizer))


def _suffix(text: str, tokenizer: Any) -> str:
    """Return the special token that a tokenizer without EOS puts after a text ([SEP]); "" if it puts none."""
    last = list(tokenizer(text)["input_ids"])[-1:]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if not special.intersection(last) or last == _plain(text, tokenizer)[-1:]:
        return ""
    return str(tokenizer.convert_ids_to_tokens(last[0]))


def _generation_ends(tokenizer: Any) -> list[str]:
    """Return the EOS tokens of ``generation_config.json`` in the directory that the tokenizer was loaded from."""
    if not tokenizer.name_or_path:
        return []
    file = Path(str(tokenizer.name_or_path)) / GENERATION
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []  # there is none, or it is malformed: `verify` says so
    said = end_tokens({}, config) if isinstance(config, dict) else None
    numbers = [n for n in said or [] if type(n) is int and 0 <= n < len(tokenizer)]
    return [token for token in tokenizer.convert_ids_to_tokens(numbers) if isinstance(token, str)]
