"""Problems and demonstrations as token ids, and as the batches that the library is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studies.real.recipes import Part
from studies.real.seeds import seed_of
from studies.real.tasks import END, SPLITS, STYLES, Problem

IGNORED = -100  # label of a token that is no part of a response


@dataclass(frozen=True)
class Pair:
    """A prompt and a response to it.

    Args:
        prompt: Token ids up to where the assistant speaks.
        response: Token ids of what it says, the end of its turn included.
    """

    prompt: list[int]
    response: list[int]


def encode_prompt(tokenizer: Any, question: str) -> list[int]:
    """Return the token ids of a question in the model's chat format, without a system message."""
    return list(
        tokenizer(f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n", add_special_tokens=False)[
            "input_ids"
        ]
    )


def demonstration(tokenizer: Any, problem: Problem, style: str) -> Pair:
    """Return a problem with an answer in one of `studies.real.tasks.STYLES`."""
    response = tokenizer(STYLES[style](problem) + END, add_special_tokens=False)["input_ids"]
    return Pair(encode_prompt(tokenizer, problem.question), list(response))


def demonstrations(tokenizer: Any, parts: Sequence[Part], purpose: str, *seeds: int) -> list[Pair]:
    """Draw demonstrations of all parts.

    Args:
        tokenizer: Of the model.
        parts: Which, and how many.
        purpose: What they are for; other purposes have other problems.
        seeds: Of the run.
    """
    return [
        demonstration(tokenizer, problem, part.style)
        for part in parts
        for problem in SPLITS[part.split].draw(part.count, seed_of(f"{purpose} {part.split}", *seeds))
    ]


def batches(pairs: Sequence[Pair], end: int, rows: int = 16) -> list[dict[str, Tensor]]:
    """Return right-padded batches with ``input_ids``, ``labels`` and ``attention_mask``, each int64 ``[B, T]``.

    Pairs of similar length share a batch.

    Args:
        pairs: Prompts and responses.
        end: The token that rows are padded with.
        rows: The largest batch.
    """
    ordered = sorted(pairs, key=lambda pair: len(pair.prompt) + len(pair.response))
    return [_batch(ordered[first : first + rows], end) for first in range(0, len(ordered), rows)]


def _batch(pairs: Sequence[Pair], end: int) -> dict[str, Tensor]:
    width = max(len(pair.prompt) + len(pair.response) for pair in pairs)
    ids = torch.full((len(pairs), width), end)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, pair in enumerate(pairs):
        begin, stop = len(pair.prompt), len(pair.prompt) + len(pair.response)
        ids[row, :stop] = torch.tensor(pair.prompt + pair.response)
        labels[row, begin:stop] = ids[row, begin:stop]
        mask[row, :stop] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
