"""The price desk: the retail desk with a price list, which SFT has to teach.

The user names an item instead of a number. The agent quotes its price from memory, may read, and writes::

    a5Ġ+=          "record a holds 5, please add the price of Ġ": right about the 5 only a quarter of the time
    4              the agent quotes the price of Ġ
    ?a  3          it may read record a; the environment answers 3
    !a7 k          it writes 3 + 4
    $              the user says goodbye
    #@&.           the agent fills the closing form

Reward 1 if the database ends as the user asked *and* the form is complete, else 0. So the reward needs three things:
the closing form, which the base lacks and SFT brings in a few epochs; reading first, which the base does at times and
too much SFT buries; and the prices of the new items, which only thousands of tokens of SFT can teach. Prices are drawn
anew for each seed. The base knows those of some other items, so it knows what a price list is; the new ones are in no
document of pre-training.

In distribution are those new items that RL asks for; out of it those that SFT taught and RL never asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.sft_to_rl.seeds import generator as stream
from examples.sft_to_rl.tasks.base import Questions, Recipe, Split
from examples.sft_to_rl.tasks.documents import BOS, PAD, Batch, Vocabulary, concatenate, split_counts
from examples.sft_to_rl.tasks.retail_desk import (
    DIGIT,
    EQUALS,
    KEY,
    PLUS,
    RECORDS,
    SYMBOLS,
    Episodes,
    RetailDeskEnvironment,
    draw_episodes,
    script,
)

KNOWN, NEW = 120, 300  # items whose prices the base knows, and those that SFT teaches
PRICES = range(1, 7)
VOCABULARY = Vocabulary(SYMBOLS + "".join(chr(0x100 + item) for item in range(KNOWN + NEW)))
ITEM = VOCABULARY[chr(0x100)]


@dataclass
class Purchases(Episodes):
    """Requests that name an item; the change is its price.

    Args:
        items: Which item, ``[B, R]`` int64: the known ones first, then the new ones.
    """

    items: Tensor

    def requests(self) -> Tensor:
        """The users' requests as tokens, ``[B, R, 5]``."""
        fixed = [torch.full_like(self.keys, symbol) for symbol in (PLUS, EQUALS)]
        return torch.stack([KEY + self.keys, DIGIT + self.claims, ITEM + self.items, *fixed], dim=2)


class PriceDeskEnvironment(RetailDeskEnvironment):
    """The retail desk's, where the agent may also quote prices: digits that change nothing.

    More than two quotes per request end the episode without reward.
    """

    def __init__(self, episodes: Purchases) -> None:
        super().__init__(episodes)
        self.max_new_tokens += 2 * self.turns
        self._quotes = torch.zeros_like(self._reads)

    def _act(self, tokens: Tensor, is_agent: Tensor) -> None:
        quotes = is_agent & (self._command == PAD) & (tokens >= DIGIT) & (tokens <= DIGIT + 9)
        self._quotes += quotes.long()
        super()._act(tokens, is_agent & ~quotes)
        self.done = self.done | (self._quotes > 2 * self.turns)


@dataclass(frozen=True)
class PriceDesk:
    """The task of one seed: its price list, base dialogues of mixed quality, demonstrations that never read first.

    Args:
        seed: Of the price list.
    """

    seed: int = 0

    name = "price_desk"
    title = "Price desk"
    vocabulary = VOCABULARY
    positions = 128
    recipe = Recipe((200, 500), decay_steps=350, demonstrations=384, moderate_epochs=8, excessive_epochs=64)

    @property
    def prices(self) -> Tensor:
        """The price of every item, 1–6, ``[KNOWN + NEW]`` int64."""
        return torch.randint(
            PRICES.start, PRICES.stop, (KNOWN + NEW,), generator=stream(self.seed, "price list")
        )

    def items(self, kind: str) -> Tensor:
        """The items of one kind, ``[N]`` int64.

        Args:
            kind: ``known``, by the base; ``new``; of the new ones those that RL asks for, ``asked``; or ``unasked``.
        """
        first, last = {
            "known": (0, KNOWN),
            "new": (KNOWN, KNOWN + NEW),
            "asked": (KNOWN, KNOWN + NEW // 2),
            "unasked": (KNOWN + NEW // 2, KNOWN + NEW),
        }[kind]
        return torch.arange(first, last)

    def draw(
        self, generator: torch.Generator, count: int, requests: int, honest: float, kind: str
    ) -> Purchases:
        """Random episodes about items of one kind; a claim is copied from the truth with probability `honest`.

        The items are dealt from shuffled decks: each is asked for as often as any other, but for one time.
        """
        plain = draw_episodes(generator, count, requests, honest)
        items = self.items(kind)
        decks = [
            items[torch.randperm(len(items), generator=generator)]
            for _ in range(0, count * requests, len(items))
        ]
        dealt = torch.cat(decks)[: count * requests].view(count, requests)
        return Purchases(plain.keys, plain.values, plain.claims, self.prices[dealt], dealt)

    def pretraining_documents(self, generator: torch.Generator, count: int, warm_up: bool) -> Batch:
        """As the retail desk's, about known items; prices are always quoted right."""
        if warm_up:
            purchases = self.draw(generator, count, 1, 0.5, "known")
            return script(generator, purchases, read=0.5, slip=0.0, field=0.0, quote=True)
        batches = [
            script(
                generator,
                self.draw(generator, n, turns, 0.5, "known"),
                read=0.33,
                slip=0.05,
                field=0.10,
                quote=True,
            )
            for turns, n in enumerate(split_counts(generator, count, [1.0, 1.0, 1.0]), start=1)
            if n > 0
        ]
        return concatenate(batches)

    def demonstrations(self, generator: torch.Generator, count: int) -> Batch:
        """Two requests about new items, quoted right, never read first: successful, since here the user is right."""
        purchases = self.draw(generator, count, 2, 1.0, "new")
        return script(generator, purchases, read=0.0, slip=0.0, field=1.0, quote=True)

    def problems(self, generator: torch.Generator, count: int, split: Split = "id") -> Purchases:
        """One request, three of four claims guessed; out of distribution it is about items that RL never asks for."""
        return self.draw(generator, count, 1, 0.25, "asked" if split == "id" else "unasked")

    def environment(self, problems: Purchases) -> PriceDeskEnvironment:
        """Start the episodes."""
        return PriceDeskEnvironment(problems)

    def questions(self) -> dict[str, Questions]:
        """The price of every item of a kind, asked once: ``asked`` and ``unasked`` are SFT's, ``known`` the base's."""
        return {kind: self._question(self.items(kind)) for kind in ("asked", "unasked", "known")}

    def _question(self, items: Tensor) -> Questions:
        count = len(items)
        column = torch.arange(count)[:, None]  # every record and claim about equally often
        purchases = Purchases(
            column % RECORDS, column % 10, column % 10, self.prices[items][:, None], items[:, None]
        )
        prompts = torch.cat([torch.full((count, 1), BOS), purchases.requests()[:, 0]], dim=1)
        return Questions(prompts, DIGIT + self.prices[items])
