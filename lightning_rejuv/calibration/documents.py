"""Which tokens of a batch are one document: padding is left out, packed rows are taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# How data loaders name tensors [B, T] that number the documents packed into a row.
DOCUMENT_KEYS = ("seq_idx", "document_ids", "sequence_id")
# How a dataset packed by TRL names the lengths of a row's documents, if they add up to the row.
LENGTHS = "seq_lengths"


def is_cumulative(key: str) -> bool:
    """Whether a key names the cumulative lengths of packed documents, as ``cu_seqlens`` and ``cu_seq_lens_q`` do."""
    return key.startswith("cu_seq")


def documents_of(
    batch: Mapping[str, Any], ids: Tensor, positions: Tensor | None, where: str
) -> list[tuple[int, Tensor]]:
    """Find the documents of a batch: what a model reads as one text, from its first token to its last.

    A new document begins where ``position_ids`` start again, where the number in ``attention_mask`` or in one of
    :data:`DOCUMENT_KEYS` changes, where an attention mask [B, 1, T, T] lets a token no longer see the one before
    it, at ``cu_seqlens``, and where ``seq_lengths`` that add up to all tokens say so.

    Args:
        batch: the batch.
        ids: [B, T] its tokens.
        positions: [B, T] its positions, if it has them.
        where: how messages name the batch.

    Returns:
        For each document its row, and where in the row its tokens are: [n] int64, in order.

    Raises:
        ValueError: a mask that is neither 0 and 1 nor causal in each document, or positions with gaps.

    >>> ids = torch.tensor([[0, 5, 6, 7, 8]])
    >>> documents_of({"attention_mask": torch.tensor([[0, 1, 1, 2, 2]])}, ids, None, "batch 0")
    [(0, tensor([1, 2])), (0, tensor([3, 4]))]
    """
    real, marks = torch.ones_like(ids, dtype=torch.bool), []
    mask = batch.get("attention_mask")
    if mask is not None:
        real, mark = _read_mask(mask, ids, where)
        marks.append(mark)
    for key, value in batch.items():
        if key in DOCUMENT_KEYS and isinstance(value, Tensor) and value.shape == ids.shape:
            marks.append(value.to(ids.device))
        elif is_cumulative(key) and isinstance(value, Tensor):
            marks.append(_from_lengths(value, ids, f"`{key}` of {where}"))
        elif key == LENGTHS and isinstance(value, Tensor) and int(value.sum()) == ids.numel():
            ends = torch.nn.functional.pad(value.flatten().to(torch.int64).cumsum(0), (1, 0))
            marks.append(_from_lengths(ends, ids, f"`{key}` of {where}"))
    found = []
    for row in range(len(ids)):
        at = real[row].nonzero().flatten()
        starts = torch.zeros(max(0, len(at) - 1), dtype=torch.bool, device=ids.device)
        for mark in marks:
            starts |= mark[row][at].diff() != 0
        if positions is not None:
            step = positions[row][at].diff()
            starts |= step <= 0
            if bool(((step > 1) & ~starts).any()):
                raise ValueError(
                    f"Expected the `position_ids` of {where} to count the tokens of each document one by one but those "
                    f"of row {row} have a gap."
                )
        cuts = (starts.nonzero().flatten() + 1).tolist()
        found += [(row, piece) for piece in at.tensor_split(cuts) if len(piece)]
    return found


def _of_shape(value: Tensor, ids: Tensor, what: str) -> Tensor:
    if value.shape != ids.shape:
        raise ValueError(f"Expected {what} to have shape {tuple(ids.shape)} but got {tuple(value.shape)}.")
    return value.to(ids.device)


def _from_lengths(value: Tensor, ids: Tensor, what: str) -> Tensor:
    """Number the documents [B, T] by the cumulative lengths that they have when all rows are put end to end."""
    ends = value.flatten().to(ids.device, torch.int64)
    ends = ends[ends >= 0]  # some loaders fill up with -1
    if not len(ends) or int(ends[0]) or bool((ends.diff() < 0).any()) or int(ends[-1]) > ids.numel():
        raise ValueError(
            f"Expected {what} to hold lengths that add up from 0 to at most {ids.numel()} tokens but got "
            f"{value.flatten()[:8].tolist()}."
        )
    starts = torch.zeros(ids.numel() + 1, dtype=torch.int64, device=ids.device)
    starts[ends] = 1
    return starts[:-1].cumsum(0).view(ids.shape)


def _read_mask(mask: Any, ids: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return which tokens count [B, T] bool, and a number for each that is the same within a document [B, T]."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"Expected the `attention_mask` of {where} to be a tensor [batch, time] or [batch, 1, time, time] but got "
            f"{got}."
        )
    if mask.dim() > 2:
        return _read_pairs(mask, ids, where)
    numbers = _of_shape(mask, ids, f"`attention_mask` of {where}")
    whole = numbers.to(torch.int64)
    if bool((numbers != whole).any()) or bool((whole < 0).any()):
        odd = float(numbers[numbers != whole.clamp(min=0)][0])
        raise ValueError(
            f"Expected the `attention_mask` of {where} to be 1 for tokens and 0 for padding, or to number the "
            f"documents of a packed row from 1, but got values such as {odd:g}."
        )
    return whole > 0, whole


def _read_pairs(mask: Tensor, ids: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Read a mask over pairs of tokens: True or 1, or 0 where it is added to the scores, lets one see another."""
    (rows, time), sees = ids.shape, mask.to(ids.device)
    if sees.dim() == 4 and sees.shape[1] == 1:
        sees = sees[:, 0]
    if sees.dim() != 3 or sees.shape[1:] != (time, time) or len(sees) not in (1, rows):
        raise ValueError(
            f"Expected the `attention_mask` of {where} to have shape ({rows}, 1, {time}, {time}) but got "
            f"{tuple(mask.shape)}."
        )
    added = sees.is_floating_point() and not bool((sees > 0).any())
    sees = (sees > -1 if added else sees > 0).expand(rows, time, time)
    real, marks = sees.diagonal(dim1=1, dim2=2), torch.zeros_like(ids)
    for row in range(rows):
        at = real[row].nonzero().flatten()
        seen = sees[row][at][:, at]
        number = torch.nn.functional.pad((~seen.diagonal(-1)).cumsum(0), (1, 0))[: len(at)]
        if not torch.equal(seen, (number[:, None] == number).tril()):
            raise ValueError(
                f"Expected the `attention_mask` of {where} to let each token see all before it in its document, and "
                f"none after it, but that of row {row} does not. Pass a mask [batch, time], or `position_ids`."
            )
        marks[row, at] = number
    return real, marks
