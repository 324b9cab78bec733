"""The retail desk: an agent that reads and writes a small database in a dialogue of several turns.

The user asks for one change at a time and claims to know the current value::

    a5+2=          "record a holds 5, please add 2": right about the 5 only half of the time
    ?a  3          the agent may read record a; the environment answers 3
    !a5 k          the agent writes 5; the environment confirms with k and brings the next request
    $              the user says goodbye
    #@&.           the agent fills the closing form, field by field in this order, and ends

Reward 1 if the database ends as the user asked *and* the form is complete, else 0. Reading first is the
careful style: without it every wrong claim costs the reward. Two requests are in distribution, three are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.sft_to_rl.tasks.base import Outcome, Problems, Questions, Recipe, Split
from examples.sft_to_rl.tasks.documents import (
    BOS,
    PAD,
    Batch,
    Transcript,
    Vocabulary,
    concatenate,
    split_counts,
)

SYMBOLS = "0123456789+-=?!.k$abcdef#@&"
VOCABULARY = Vocabulary(SYMBOLS)
READ, WRITE, END, CONFIRM, GOODBYE = VOCABULARY.encode("?!.k$")
PLUS, MINUS, EQUALS = VOCABULARY.encode("+-=")
FORM = VOCABULARY.encode("#@&")
DIGIT, KEY = VOCABULARY["0"], VOCABULARY["a"]
RECORDS = 6
ABSENT = -1  # value of a record that the episode does not have


@dataclass
class Episodes(Problems):
    """Requests of a batch of episodes, each ``[B, R]`` int64.

    Args:
        keys: Which record, 0–5, different in every request.
        values: The record's true value, 0–9.
        claims: The value that the user claims, 0–9.
        changes: The signed change he asks for, ±1 to ±3.
    """

    keys: Tensor
    values: Tensor
    claims: Tensor
    changes: Tensor

    @property
    def targets(self) -> Tensor:
        """The values that the records should hold in the end, ``[B, R]``."""
        return (self.values + self.changes) % 10

    def requests(self) -> Tensor:
        """The users' requests as tokens, ``[B, R, 5]``."""
        sign = torch.where(self.changes > 0, PLUS, MINUS)
        equals = torch.full_like(self.keys, EQUALS)
        columns = [KEY + self.keys, DIGIT + self.claims, sign, DIGIT + self.changes.abs(), equals]
        return torch.stack(columns, dim=2)


def draw_episodes(generator: torch.Generator, count: int, requests: int, honest: float) -> Episodes:
    """Random episodes in which a claim is copied from the truth with probability `honest`, else random."""
    shape = (count, requests)
    values = torch.randint(10, shape, generator=generator)
    guesses = torch.randint(10, shape, generator=generator)
    knows = torch.rand(shape, generator=generator) < honest
    sizes = torch.randint(1, 4, shape, generator=generator)
    signs = 2 * torch.randint(2, shape, generator=generator) - 1
    keys = torch.rand((count, RECORDS), generator=generator).argsort(dim=1)[:, :requests]
    return Episodes(keys, values, torch.where(knows, values, guesses), sizes * signs)


def script(
    generator: torch.Generator,
    episodes: Episodes,
    read: float,
    slip: float,
    field: float,
    quote: bool = False,
) -> Batch:
    """Scripted dialogues.

    Args:
        generator: Of what the agent does.
        episodes: What the users ask for.
        read: Probability of reading first, per request.
        slip: Probability of writing a random digit, per request.
        field: Probability of each field of the form.
        quote: Whether the agent first says each change, a digit.
    """
    shape = episodes.keys.shape
    reads = torch.rand(shape, generator=generator) < read
    slips = torch.rand(shape, generator=generator) < slip
    fields = torch.rand((shape[0], len(FORM)), generator=generator) < field
    believed = torch.where(reads, episodes.values, episodes.claims)
    written = torch.where(
        slips, torch.randint(10, shape, generator=generator), (believed + episodes.changes) % 10
    )

    transcript = Transcript(shape[0])
    transcript.environment(BOS)
    for turn, request in enumerate(episodes.requests().unbind(1)):
        key = KEY + episodes.keys[:, turn]
        transcript.environment(request)
        if quote:
            transcript.agent(DIGIT + episodes.changes[:, turn])
        transcript.agent(READ, keep=reads[:, turn])
        transcript.agent(key, keep=reads[:, turn])
        transcript.environment(DIGIT + episodes.values[:, turn], keep=reads[:, turn])
        transcript.agent(WRITE)
        transcript.agent(key)
        transcript.agent(DIGIT + written[:, turn])
        transcript.environment(CONFIRM)
    transcript.environment(GOODBYE)
    for position, token in enumerate(FORM):
        transcript.agent(token, keep=fields[:, position])
    transcript.agent(END)
    return transcript.batch()


class RetailDeskEnvironment:
    """The user and the database of a batch of episodes, as one state machine over tensors.

    Malformed commands, more than two reads per request, a write after the goodbye and a form field before it
    end the episode without reward.
    """

    def __init__(self, episodes: Episodes) -> None:
        requests = episodes.requests()
        batch, self.turns = episodes.keys.shape
        self.prompts = torch.cat([torch.full((batch, 1), BOS), requests[:, 0]], dim=1)
        self.max_new_tokens = 15 * self.turns + 8
        self.done = torch.zeros(batch, dtype=torch.bool)

        absent = torch.full((batch, RECORDS), ABSENT)
        self._database = absent.scatter(1, episodes.keys, episodes.values)
        self._goal = absent.scatter(1, episodes.keys, episodes.targets)
        # What it says after the i-th write: a confirmation, then the next request or the goodbye.
        self._replies = torch.full((batch, self.turns + 1, 6), PAD)
        self._replies[:, :, 0] = CONFIRM
        self._replies[:, : self.turns - 1, 1:] = requests[:, 1:]
        self._replies[:, self.turns - 1 :, 1] = GOODBYE
        self._pending = torch.full((batch, 6), PAD)  # what it is about to say, PAD where it is silent

        self._command = torch.full((batch,), PAD)  # READ or WRITE while its arguments are being written
        self._key = torch.full((batch,), ABSENT)
        self._reads, self._writes, self._fields = (torch.zeros(batch, dtype=torch.long) for _ in range(3))
        self._in_order = torch.ones(batch, dtype=torch.bool)
        self._ended = torch.zeros(batch, dtype=torch.bool)
        self._rows = torch.arange(batch)
        self._form = torch.tensor([*FORM, PAD])  # PAD: no field is right in fourth place

    def step(self, proposed: Tensor) -> tuple[Tensor, Tensor]:
        """See `Environment.step`."""
        speaks = self._pending[:, 0] != PAD
        is_agent = ~speaks & ~self.done
        tokens = torch.where(speaks, self._pending[:, 0], proposed).masked_fill(self.done, PAD)
        self._pending = torch.cat([self._pending[:, 1:], torch.full_like(self._pending[:, :1], PAD)], dim=1)
        self._act(tokens, is_agent)
        return tokens, is_agent

    def _act(self, tokens: Tensor, is_agent: Tensor) -> None:
        needs_command = is_agent & (self._command == PAD)
        needs_key = is_agent & (self._command != PAD) & (self._key == ABSENT)
        needs_digit = is_agent & (self._command != PAD) & (self._key != ABSENT)

        # A new command: a read or a write begins, a form field is filled, or the agent ends the dialogue.
        begins = needs_command & ((tokens == READ) | (tokens == WRITE))
        fills = needs_command & torch.isin(tokens, self._form[: len(FORM)])
        ends = needs_command & (tokens == END)
        self._command = torch.where(begins, tokens, self._command)
        self._in_order &= ~fills | (tokens == self._form[self._fields.clamp(max=len(FORM))])
        self._fields += fills.long()
        self._ended |= ends
        invalid = needs_command & ~(begins | fills | ends)
        invalid |= fills & ((self._writes < self.turns) | (self._fields > len(FORM)))

        # Its first argument, a key. A read is complete with it; a record that does not exist reads as 0.
        key = tokens - KEY
        invalid |= needs_key & ((key < 0) | (key >= RECORDS))
        needs_key &= ~invalid
        self._key = torch.where(needs_key, key, self._key)
        reads = needs_key & (self._command == READ)
        value = self._database[self._rows, self._key.clamp(min=0)].clamp(min=0)
        self._pending[:, 0] = torch.where(reads, DIGIT + value, self._pending[:, 0])
        self._reads += reads.long()
        invalid |= self._reads > 2 * self.turns

        # Its second argument, a digit: the write is complete.
        digit = tokens - DIGIT
        invalid |= needs_digit & ((digit < 0) | (digit > 9))
        writes = needs_digit & ~invalid
        rows, columns = self._rows[writes], self._key[writes]
        self._database[rows, columns] = digit[writes]
        self._pending[writes] = self._replies[rows, self._writes[writes].clamp(max=self.turns)]
        self._writes += writes.long()
        invalid |= self._writes > self.turns

        finished = reads | writes
        self._command = self._command.masked_fill(finished, PAD)
        self._key = self._key.masked_fill(finished, ABSENT)
        self.done = self.done | self._ended | invalid

    def outcome(self) -> Outcome:
        """See `Environment.outcome`; the careful style is measured as reads per request."""
        form = self._ended & self._in_order & (self._fields == len(FORM))
        served = self._writes == self.turns
        solved = self._ended & served & (self._database == self._goal).all(dim=1)
        reads = self._reads.float() / self.turns
        return Outcome((form & solved).float(), form.float(), reads, solved.float())


@dataclass(frozen=True)
class RetailDesk:
    """The task: base dialogues of mixed quality, demonstrations that never read first.

    Args:
        requests: Of a dialogue in distribution; out of it there is one more.
    """

    requests: int = 2

    name = "retail_desk"
    title = "Retail desk"
    vocabulary = VOCABULARY
    positions = 128
    recipe = Recipe((200, 500), decay_steps=350, demonstrations=128, moderate_epochs=8, excessive_epochs=64)

    def pretraining_documents(self, generator: torch.Generator, count: int, warm_up: bool) -> Batch:
        """One request, read half of the time; then one to all, rarely read, with slips and lone fields."""
        if warm_up:
            return script(
                generator, draw_episodes(generator, count, 1, honest=0.5), read=0.5, slip=0.0, field=0.0
            )
        batches = [
            script(
                generator, draw_episodes(generator, n, turns, honest=0.5), read=0.25, slip=0.05, field=0.10
            )
            for turns, n in enumerate(split_counts(generator, count, [1.0] * (self.requests + 1)), start=1)
            if n > 0
        ]
        return concatenate(batches)

    def demonstrations(self, generator: torch.Generator, count: int) -> Batch:
        """A rejection-sampled log of an agent that never reads: successful, since here the user is right."""
        return script(
            generator,
            draw_episodes(generator, count, self.requests, honest=1.0),
            read=0.0,
            slip=0.0,
            field=1.0,
        )

    def problems(self, generator: torch.Generator, count: int, split: Split = "id") -> Episodes:
        """One request more out of distribution; every second claim is a guess."""
        return draw_episodes(generator, count, self.requests + (split == "ood"), honest=0.5)

    def environment(self, problems: Episodes) -> RetailDeskEnvironment:
        """Start the episodes."""
        return RetailDeskEnvironment(problems)

    def questions(self) -> dict[str, Questions]:
        """None: SFT teaches no facts here."""
        return {}
