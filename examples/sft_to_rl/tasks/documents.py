"""Token vocabularies, and documents written segment by segment with a record of who wrote what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PAD, BOS = 0, 1
IGNORE = -100  # label of a position without a target, as in Hugging Face

Batch = dict[str, Tensor]


class Vocabulary:
    """One token per character, after padding (0) and beginning-of-sequence (1).

    Args:
        symbols: The characters, in the order of their ids.

    Example:
        >>> vocabulary = Vocabulary("abc")
        >>> vocabulary.encode("cab"), vocabulary.decode([1, 4, 2, 3, 0])
        ([4, 2, 3], 'cab')
    """

    def __init__(self, symbols: str) -> None:
        self.symbols = symbols
        self._ids = {symbol: i for i, symbol in enumerate(symbols, start=2)}

    def __len__(self) -> int:
        return len(self.symbols) + 2

    def __getitem__(self, symbol: str) -> int:
        """The id of one symbol."""
        return self._ids[symbol]

    def encode(self, text: str) -> list[int]:
        """Ids of the characters of `text`."""
        return [self._ids[symbol] for symbol in text]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of `ids`, without padding and beginning-of-sequence."""
        return "".join(self.symbols[int(i) - 2] for i in ids if int(i) > BOS)


class Transcript:
    """Writes `count` documents side by side, one segment after the other.

    A segment may be left out of some documents (`keep`), so documents differ in length; `batch()` closes the
    gaps and pads on the right. Labels are set on the agent's tokens only: neither pre-training nor SFT ever
    learns to speak for the user or the database.

    Example:
        >>> transcript = Transcript(2)
        >>> transcript.environment(torch.tensor([[5], [6]]))
        >>> transcript.agent(7, keep=torch.tensor([False, True]))
        >>> transcript.agent(8)
        >>> batch = transcript.batch()
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 8, 0], [6, 7, 8]], [[-100, 8, -100], [-100, 7, 8]])
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tokens: list[Tensor] = []
        self._agent: list[Tensor] = []
        self._keep: list[Tensor] = []

    def environment(self, tokens: Tensor | int, keep: Tensor | None = None) -> None:
        """Append what the environment writes: ``[count, width]``, ``[count]`` or one id for all."""
        self._append(tokens, keep, agent=False)

    def agent(self, tokens: Tensor | int, keep: Tensor | None = None) -> None:
        """Append what the agent writes."""
        self._append(tokens, keep, agent=True)

    def _append(self, tokens: Tensor | int, keep: Tensor | None, agent: bool) -> None:
        tokens = torch.as_tensor(tokens)
        tokens = tokens[:, None] if tokens.ndim == 1 else tokens
        tokens = tokens.expand(self.count, tokens.shape[1] if tokens.ndim == 2 else 1)
        self._tokens.append(tokens)
        self._agent.append(torch.full_like(tokens, agent, dtype=torch.bool))
        kept = torch.ones(self.count, dtype=torch.bool) if keep is None else keep
        self._keep.append(kept[:, None].expand_as(tokens))

    def batch(self) -> Batch:
        """``input_ids`` and ``labels``, both ``[count, longest]`` int64."""
        tokens, agent, keep = (torch.cat(parts, dim=1) for parts in (self._tokens, self._agent, self._keep))
        order = (~keep).int().argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
        tokens, agent, keep = (x.gather(1, order) for x in (tokens, agent, keep))
        return {
            "input_ids": tokens.masked_fill(~keep, PAD),
            "labels": tokens.masked_fill(~(keep & agent), IGNORE),
        }


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Stack batches of different lengths into one, padded on the right."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    padding = {"input_ids": PAD, "labels": IGNORE}
    return {
        key: torch.cat([F.pad(b[key], (0, width - b[key].shape[1]), value=value) for b in batches])
        for key, value in padding.items()
    }


def split_counts(generator: torch.Generator, count: int, weights: Sequence[float]) -> list[int]:
    """How many of `count` independent draws fall on each of the weighted choices."""
    draws = torch.multinomial(torch.tensor(weights), count, replacement=True, generator=generator)
    return torch.bincount(draws, minlength=len(weights)).tolist()
