"""The retail desk with long responses: before the user says goodbye, the agent writes a note of many digits.

The note changes nothing and is not judged. It makes responses long: the base's notes vary, and those of SFT's
demonstrations are all the same, so a note adds nats to whatever is summed over a response. A rule for alpha that counts
nats moves with the length of the note; from which fusions RL succeeds need not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.sft_to_rl.tasks.documents import PAD, Batch
from examples.sft_to_rl.tasks.retail_desk import (
    DIGIT,
    GOODBYE,
    Episodes,
    RetailDesk,
    RetailDeskEnvironment,
)

VARIED = (
    0.5  # how often a digit of the base's notes is drawn from all ten; otherwise it is a 0, as SFT's all are
)


class NotedDeskEnvironment(RetailDeskEnvironment):
    """The retail desk's, whose user says goodbye when the agent has written its note.

    Anything but a digit within the note ends the episode without reward.
    """

    def __init__(self, episodes: Episodes, note: int) -> None:
        super().__init__(episodes)
        self.max_new_tokens += note
        self._note = note
        self._noted = torch.zeros_like(self._writes)
        self._replies[:, self.turns - 1 :, 1] = PAD  # the goodbye waits for the note

    def _act(self, tokens: Tensor, is_agent: Tensor) -> None:
        due = is_agent & (self._writes == self.turns) & (self._noted < self._note)
        digits = (tokens >= DIGIT) & (tokens <= DIGIT + 9)
        self._noted += (due & digits).long()
        super()._act(tokens, is_agent & ~due)
        self._pending[due & (self._noted == self._note), 0] = GOODBYE
        self.done = self.done | (due & ~digits)


@dataclass(frozen=True)
class NotedDesk(RetailDesk):
    """The retail desk with a note of `note` digits at the end of every dialogue.

    Args:
        note: Digits of the note, which are tokens.
    """

    note: int = 32

    title = "Retail desk with notes"

    @property
    def name(self) -> str:  # type: ignore[override]
        """One for each length."""
        return f"noted_desk_{self.note}"

    def pretraining_documents(self, generator: torch.Generator, count: int, warm_up: bool) -> Batch:
        """The retail desk's, with varied notes."""
        batch = super().pretraining_documents(generator, count, warm_up)
        varied = torch.rand(count, self.note, generator=generator) < VARIED
        return _with_notes(batch, torch.randint(10, (count, self.note), generator=generator) * varied)

    def demonstrations(self, generator: torch.Generator, count: int) -> Batch:
        """The retail desk's, with notes of zeros."""
        batch = super().demonstrations(generator, count)
        return _with_notes(batch, torch.zeros(count, self.note, dtype=torch.long))

    def environment(self, problems: Episodes) -> NotedDeskEnvironment:
        """Start the episodes."""
        return NotedDeskEnvironment(problems, self.note)


def _with_notes(batch: Batch, digits: Tensor) -> Batch:
    """Put each row's note before its goodbye; the agent writes it."""
    notes = DIGIT + digits
    goodbyes = (batch["input_ids"] == GOODBYE).int().argmax(dim=1).tolist()
    return {
        key: torch.stack(
            [
                torch.cat([row[:at], note, row[at:]])
                for row, note, at in zip(rows, notes, goodbyes, strict=True)
            ]
        )
        for key, rows in batch.items()
    }
