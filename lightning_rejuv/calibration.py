"""Calibration batches: (prompt, response) pairs as a causal language model takes them, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One checked calibration batch.

    Attributes:
        inputs: what the model's ``forward`` takes: ``input_ids`` [B, T], perhaps ``attention_mask``.
        targets: [B, T - 1] int64, the token that position t has to predict; 0 outside the response.
        response: [B, T - 1] bool, where ``targets`` is a token of the response.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    response: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.targets.to(device), self.response.to(device))


def as_batches(calibration: Iterable[Any] | None, what: str = "calibration") -> list[Batch]:
    """Check calibration data and bring it into one form.

    Args:
        calibration: an iterable of mappings with ``input_ids`` [B, T], ``labels`` [B, T] (-100 outside
            the response, aligned with ``input_ids`` as Hugging Face does it) and perhaps
            ``attention_mask`` [B, T]; other keys are ignored.
        what: how messages name the data.

    Returns:
        The batches, as a list: attribution reads them more than once.

    Raises:
        ValueError: no batch at all, a key is missing, shapes differ, or a response has no token.
        TypeError: a batch is no mapping of tensors.

    >>> ids = torch.tensor([[5, 6, 7, 8]])
    >>> batch = as_batches([{"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]])}])[0]
    >>> batch.targets, batch.response
    (tensor([[0, 7, 8]]), tensor([[False,  True,  True]]))
    """
    if calibration is None:
        raise ValueError(
            f"Expected {what} batches but got None. Pass batches with `input_ids` and `labels` "
            "(-100 outside the response), or set `reset_fraction=0` and a number for `alpha` for fusion alone."
        )
    batches = [_checked(batch, f"{what} batch {number}") for number, batch in enumerate(calibration)]
    if not batches:
        raise ValueError(f"Expected at least one {what} batch but the iterable is empty.")
    return batches


def check_token_ids(model: nn.Module, batches: list[Batch]) -> None:
    """Refuse tokens that a model has no embedding for: on a GPU they would end the process.

    Args:
        model: the language model; one without a table of input embeddings is taken on trust.
        batches: calibration batches.

    Raises:
        ValueError: a token lies outside the vocabulary.
    """
    table = getattr(model, "get_input_embeddings", lambda: None)()
    size = int(getattr(table, "num_embeddings", 0))
    for number, batch in enumerate(batches if size else ()):
        low, high = (int(end) for end in batch.inputs["input_ids"].aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"Expected the tokens of calibration batch {number} to lie in the model's vocabulary of {size} but got "
                f"{low if low < 0 else high}. Was it made with this model's tokenizer, and padded with its tokens?"
            )


def _checked(batch: Any, where: str) -> Batch:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected {where} to be a mapping with `input_ids` and `labels` but got {type(batch)}."
        )
    for key in ("input_ids", "labels"):
        if not isinstance(batch.get(key), Tensor):
            raise ValueError(f"Expected {where} to hold a tensor {key!r} but its keys are {sorted(batch)}.")
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.dim() != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"Expected {where} to hold `input_ids` and `labels` of one shape [batch, time] but got "
            f"{tuple(ids.shape)} and {tuple(labels.shape)}."
        )
    targets = labels[:, 1:]
    response = targets != IGNORED
    empty = (~response.any(dim=1)).nonzero().flatten().tolist()
    if empty or not len(ids):
        raise ValueError(
            f"Expected every response in {where} to have at least one token but rows {empty[:8]} have none: "
            "their labels are all -100. Mask the prompt only, and drop pairs whose response was cut off."
        )
    inputs = {"input_ids": ids}
    if isinstance(batch.get("attention_mask"), Tensor):
        inputs["attention_mask"] = batch["attention_mask"]
    return Batch(inputs, targets.masked_fill(~response, 0), response)
