"""Calibration batches: (prompt, response) pairs as a causal language model takes them, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_rejuv.calibration.bounded import bounded, check_batches, most_read
from lightning_rejuv.calibration.documents import DOCUMENT_KEYS, LENGTHS, documents_of, is_cumulative
from lightning_rejuv.forward import keeping_random_state
from lightning_rejuv.warned import warn

IGNORED = -100

# How many tokens go through a model at a time, padding included, one row at least. An estimate: with gradients a layer
# of an 8B model in bfloat16 keeps 200 KB a token, 32 layers of 4096 tokens 26 GB, which fit 80 GB beside three.
TOKENS_A_PASS = 4096

T = TypeVar("T")

# What has one number for each token, and goes along with the token.
_PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids")
_READ = ("input_ids", "labels", "attention_mask", *_PER_TOKEN, *DOCUMENT_KEYS, LENGTHS)


@dataclass(frozen=True)
class Batch:
    """One checked calibration batch: one document a row, padded on the right.

    Attributes:
        inputs: what the model's ``forward`` takes: ``input_ids`` [B, T] int64, if there is padding
            ``attention_mask`` [B, T], ``position_ids`` [B, T] if they do not count from 0, and token types.
        targets: [B, T - 1] int64, the token that position t has to predict; 0 outside the response.
        response: [B, T - 1] bool, where ``targets`` is a token of the response.
        where: how messages name the caller's batch.
        rows: for each row, which of the caller's rows it comes from.
        whole: rows and tokens, padding included, of the batch that this one is a part of, so that a pass has no more
            tokens than it may have; None if it is no part.
        unused: the names of the caller's other tensors.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    response: Tensor
    where: str = ""
    rows: tuple[int, ...] = ()
    whole: tuple[int, int] | None = None
    unused: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(
            self, inputs=inputs, targets=self.targets.to(device), response=self.response.to(device)
        )

    @property
    def predicting(self) -> Tensor:
        """[B, T] bool, the positions whose logits predict a token of the response."""
        return torch.nn.functional.pad(self.response, (0, 1))

    @property
    def lengths(self) -> Tensor:
        """[B] int64, how many tokens each row has up to the end of its response."""
        return (
            self.response * torch.arange(2, self.response.shape[1] + 2, device=self.response.device)
        ).amax(1)


def as_batches(
    calibration: Iterable[Any], what: str = "calibration", tokens: float = float("inf")
) -> list[Batch]:
    """Check calibration data and bring it into one form.

    Padding is left out wherever it stands, and rows into which several documents are packed are taken apart, as
    :func:`lightning_rejuv.calibration.documents.documents_of` finds them: a response is scored with its own prompt
    before it and nothing else, whatever batch it comes in. Documents without a response token are left out of packed
    rows.

    Args:
        calibration: an iterable of mappings with ``input_ids`` [B, T], ``labels`` [B, T] (-100 outside
            the response, aligned with ``input_ids`` as Hugging Face does it) and perhaps
            ``attention_mask`` [B, T], ``position_ids`` and token types: tensors, arrays of NumPy or lists. Without
            the first dimension, as a dataset has it, a mapping is one row. The global random states are left as they
            were, also if a ``DataLoader`` draws its seeds from them.
        what: how messages name the data.
        tokens: how many a batch may have, padding included; one that has more becomes several, of one row at least.

    Returns:
        The batches, as a list: attribution reads them more than once. With so many responses as
        :func:`lightning_rejuv.calibration.bounded.most_read` says no further batch is read, and a warning says so. No
        batch has more tokens than the caller's, padding included.

    Raises:
        ValueError: no batch at all, a key is missing, shapes differ, labels are not the tokens at their positions, a
            response has no token, or a mask or positions that cannot be understood.
        TypeError: it is no iterable of batches, a batch is no mapping, or its tokens are no integers.

    >>> ids = torch.tensor([[5, 6, 7, 8]])
    >>> batch = as_batches([{"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]])}])[0]
    >>> batch.targets, batch.response
    (tensor([[0, 7, 8]]), tensor([[False,  True,  True]]))
    """
    check_batches(calibration, what)
    batches: list[Batch] = []
    masked = False
    with keeping_random_state():
        checked = (
            _checked(batch, f"{what} batch {number}", tokens) for number, batch in enumerate(calibration)
        )
        most = most_read(calibration)
        for part, masks_prompt in bounded(
            checked, what, most, lambda found: sum(len(b.rows) for b in found[0])
        ):
            batches += part
            masked = masked or masks_prompt
    if not batches:
        raise ValueError(f"Expected at least one {what} batch but the iterable is empty.")
    if not masked:
        warn(
            f"No prompt token of the {what} data is masked: the labels cover the prompts, which count as response. Set "
            "the labels of prompts to -100.",
            stacklevel=2,
        )
    return batches


def _checked(batch: Any, where: str, most: float) -> tuple[list[Batch], bool]:
    """Return the batches that one of the caller's becomes, and whether it masks any prompt's first token."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected {where} to be a mapping with `input_ids` and `labels` but got {type(batch)}."
        )
    batch = _as_tensors(batch, where)
    for key in ("input_ids", "labels"):
        if not isinstance(batch.get(key), Tensor):
            raise ValueError(f"Expected {where} to hold a tensor {key!r} but its keys are {sorted(batch)}.")
    ids = _integers(batch["input_ids"], f"`input_ids` of {where}")
    labels = _integers(batch["labels"], f"`labels` of {where}").to(ids.device)
    if ids.dim() != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"Expected {where} to hold `input_ids` and `labels` of one shape [batch, time] but got "
            f"{tuple(ids.shape)} and {tuple(labels.shape)}."
        )
    _check_aligned(ids, labels, where)
    tokens = {"input_ids": ids, "labels": labels, **_per_token(batch, ids, where)}
    found = documents_of(batch, ids, tokens.get("position_ids"), where)
    with_response = [(row, at) for row, at in found if bool((labels[row][at][1:] != IGNORED).any())]
    empty = sorted(set(range(len(ids))) - {row for row, _ in with_response})
    if empty or not len(ids):
        raise ValueError(
            f"Expected every response in {where} to have at least one token but rows {empty[:8]} have none: "
            "their labels are all -100. Mask the prompt only, and drop pairs whose response was cut off."
        )
    _warn_of_labelled_padding(labels, found, where)
    # A causal model does not look at what follows the last token of the response.
    documents = [
        (row, at[: int((labels[row][at] != IGNORED).nonzero()[-1]) + 1]) for row, at in with_response
    ]
    # Who packs masks the first token of every document, which the one before it must not predict: that alone is no
    # prompt.
    first = 1 if len(found) > len(ids) else 0
    masks_prompt = any(int(labels[row, at[first]]) == IGNORED for row, at in documents)
    taken = {"attention_mask", *tokens}
    unused = tuple(
        key
        for key, value in batch.items()
        if isinstance(value, (Tensor, list, tuple))
        and key not in taken
        and not (isinstance(value, Tensor) and _is_of_no_matter(key, value, ids))
    )
    parts = [
        part
        for together in in_parts(documents, ids.numel(), _length)
        for part in _in_passes(tokens, together, most)
    ]
    return [replace(part, where=where, unused=unused) for part in parts], masks_prompt


def _as_tensors(batch: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a batch with tensors in place of arrays and lists of numbers, and with rows if it is one row."""
    found = dict(batch)
    for key, value in batch.items():
        if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
            # A default `collate_fn` makes of lists a list of tensors by time: it is not what it seems to be.
            tensors = isinstance(value, (list, tuple)) and any(isinstance(entry, Tensor) for entry in value)
            with suppress(TypeError, ValueError, RuntimeError):
                found[key] = value if tensors else torch.tensor(value)
            if key in _READ and not isinstance(found[key], Tensor):
                raise ValueError(
                    f"Expected {key!r} of {where} to be a tensor, or lists of numbers of one length, but got "
                    f"{'a list of tensors' if tensors else f'a {type(value).__name__} that is neither'}. Pad the rows, "
                    "with -100 in `labels`, or pass them one by one."
                )
    ids = found.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 1:
        for key, value in found.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:
                found[key] = value[None]
    return found


def _is_of_no_matter(key: str, value: Tensor, ids: Tensor) -> bool:
    """Whether a tensor only says where documents are, or that there is no cache."""
    if key == "cache_position":
        return torch.equal(value.flatten().cpu(), torch.arange(ids.shape[1]))
    return is_cumulative(key) or key == LENGTHS or (key in DOCUMENT_KEYS and value.shape == ids.shape)


def _integers(value: Tensor, what: str) -> Tensor:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"Expected {what} to be integers but got {value.dtype}.")
    value = value.to(torch.int64)
    # What was made in inference mode may not be saved for a backward pass.
    return value.clone() if value.is_inference() else value


def _check_aligned(ids: Tensor, labels: Tensor, where: str) -> None:
    wrong = ((labels != IGNORED) & (labels != ids)).nonzero()
    if len(wrong):
        row, at = wrong[0].tolist()
        raise ValueError(
            f"Expected the labels of {where} to be -100 or the token of `input_ids` at the same position, as Hugging "
            f"Face aligns them, but row {row} has label {int(labels[row, at])} at position {at}, where the token is "
            f"{int(ids[row, at])}. Labels that are shifted already have to be shifted back by one."
        )


def _per_token(batch: Mapping[str, Any], ids: Tensor, where: str) -> dict[str, Tensor]:
    found = {}
    for key in _PER_TOKEN:
        value = batch.get(key)
        if not isinstance(value, Tensor):
            continue
        value = _integers(value, f"`{key}` of {where}").to(ids.device)
        if value.dim() == 3 and bool((value == value[:1]).all()):
            value = value[0]  # a position in text, counted alike along time, height and width
        if (
            value.dim() not in (1, 2)
            or value.shape[-1] != ids.shape[1]
            or value[..., 0].numel() not in (1, len(ids))
        ):
            raise ValueError(
                f"Expected `{key}` of {where} to have shape {tuple(ids.shape)}, one number for each token of a text, "
                f"but got {tuple(batch[key].shape)}."
            )
        found[key] = value.expand(ids.shape)
    return found


def _warn_of_labelled_padding(labels: Tensor, found: list[tuple[int, Tensor]], where: str) -> None:
    padding = torch.ones_like(labels, dtype=torch.bool)
    for row, at in found:
        padding[row, at] = False
    if bool((padding & (labels != IGNORED)).any()):
        warn(
            f"The labels of {where} cover padding, which `attention_mask` masks: it does not count as response. Set "
            "its labels to -100.",
            stacklevel=2,
        )


def in_parts(
    items: Iterable[T], tokens: float, length: Callable[[T], int], rows: float = float("inf")
) -> Iterator[list[T]]:
    """Put neighbours together as long as the longest, times their number, is no more than so many tokens.

    Args:
        items: documents, rows, pairs; one that is longer is a part of its own.
        tokens: how many tokens a part may have, padding included.
        length: how many one of them has.
        rows: how many may be put together at most.

    >>> list(in_parts([2, 2, 3, 9, 1], 6, int)), list(in_parts([1, 1, 1], 6, int, rows=2))
    ([[2, 2], [3], [9], [1]], [[1, 1], [1]])
    """
    part: list[T] = []
    longest = 0
    for item in items:
        longest = max(longest, length(item))
        if part and (len(part) >= rows or longest * (len(part) + 1) > tokens):
            yield part
            part, longest = [], length(item)
        part.append(item)
    if part:
        yield part


def _length(document: tuple[int, Tensor]) -> int:
    return len(document[1])


def _in_passes(
    tokens: Mapping[str, Tensor], documents: list[tuple[int, Tensor]], most: float
) -> Iterator[Batch]:
    """Put documents into batches that have no more tokens than a pass may have."""
    parts = list(in_parts(documents, most, _length))
    whole = (len(documents), len(documents) * max(map(_length, documents)))
    for part in parts:
        yield replace(_in_rows(tokens, part), whole=whole if len(parts) > 1 else None)


def _in_rows(tokens: Mapping[str, Tensor], documents: list[tuple[int, Tensor]]) -> Batch:
    """Put each document into a row of its own, padded on the right."""
    width, device = max(map(_length, documents)), tokens["input_ids"].device
    rows = {
        key: torch.full((len(documents), width), IGNORED if key == "labels" else 0, device=device)
        for key in tokens
    }
    mask = torch.zeros((len(documents), width), dtype=torch.int64, device=device)
    for number, (row, at) in enumerate(documents):
        for key, value in tokens.items():
            rows[key][number, : len(at)] = value[row, at]
        mask[number, : len(at)] = 1
    labels, positions = rows.pop("labels"), rows.pop("position_ids", None)
    if not bool(mask.all()):
        rows["attention_mask"] = mask
    if positions is not None and bool((positions != mask.cumsum(1) - 1)[mask > 0].any()):
        rows["position_ids"] = positions
    targets = labels[:, 1:]
    response = targets != IGNORED
    return Batch(rows, targets.masked_fill(~response, 0), response, rows=tuple(row for row, _ in documents))
