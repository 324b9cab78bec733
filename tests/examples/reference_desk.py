"""The retail desk written a second time: one episode, characters and a dict, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from examples.sft_to_rl.tasks.documents import Vocabulary
from examples.sft_to_rl.tasks.retail_desk import VOCABULARY, RetailDeskEnvironment


class Over(Exception):
    """The episode ended."""


@dataclass
class Reference:
    """One episode; `transcript` and `mask` leave the first request out, as rollouts do."""

    transcript: str = ""
    mask: str = ""  # A where the agent wrote, e where the environment did
    reward: float = 0.0
    form_complete: float = 0.0
    solved: float = 0.0
    reads: int = 0


def play(
    keys: str,
    values: str,
    claims: str,
    changes: list[int],
    agent: Iterable[str],
    items: str = "",
) -> Reference:
    """Play one episode with the characters that the agent would write; stop when they run out.

    At the price desk requests name `items`, and the agent may quote prices, two for each request.
    """
    episode, agent = Reference(), iter(agent)

    def say(text: str) -> None:
        episode.transcript += text
        episode.mask += "e" * len(text)

    def take() -> str:
        symbol = next(agent, None)
        if symbol is None:
            raise Over
        episode.transcript += symbol
        episode.mask += "A"
        return symbol

    asked = [f"{item}+" for item in items] or [f"{'+' if d > 0 else '-'}{abs(d)}" for d in changes]
    requests = [f"{k}{c}{a}=" for k, c, a in zip(keys, claims, asked, strict=True)]
    quotes = 0
    database = {k: int(v) for k, v in zip(keys, values, strict=True)}
    goal = {k: (int(v) + d) % 10 for k, v, d in zip(keys, values, changes, strict=True)}
    served, form = 0, ""
    try:
        while True:
            command = take()
            if command == ".":
                episode.form_complete = float(form == "#@&")
                episode.solved = float(served == len(requests) and database == goal)
                episode.reward = episode.solved * episode.form_complete
                raise Over
            if items and command.isdigit():
                quotes += 1
                if quotes > 2 * len(requests):
                    raise Over
            elif command in "#@&":
                form += command
                if served < len(requests) or len(form) > 3:
                    raise Over
            elif command in "?!":
                key = take()
                if key not in "abcdef":
                    raise Over
                if command == "?":
                    episode.reads += 1
                    if episode.reads > 2 * len(requests):
                        raise Over
                    say(str(database.get(key, 0)))
                else:
                    digit = take()
                    if not digit.isdigit():
                        raise Over
                    database[key] = int(digit)
                    served += 1
                    if served > len(requests):
                        raise Over
                    say("k" + (requests[served] if served < len(requests) else "$"))
            else:
                raise Over
    except Over:
        return episode


def drive(
    environment: RetailDeskEnvironment, scripts: list[str], vocabulary: Vocabulary = VOCABULARY
) -> list[Reference]:
    """Let scripted agents play in the tensor environment; where a script has run out, stop."""
    played = [Reference() for _ in scripts]
    written = [0] * len(scripts)
    for _ in range(environment.max_new_tokens):
        proposals = [
            script[i] if i < len(script) else "." for script, i in zip(scripts, written, strict=True)
        ]
        tokens, is_agent = environment.step(torch.tensor([vocabulary[symbol] for symbol in proposals]))
        for row, (token, agent) in enumerate(zip(tokens.tolist(), is_agent.tolist(), strict=True)):
            played[row].transcript += vocabulary.decode([token])
            played[row].mask += "" if token == 0 else "A" if agent else "e"
            written[row] += agent
        if environment.done.all():
            break
    outcome = environment.outcome()
    for row, reference in enumerate(played):
        reference.reward = float(outcome.rewards[row])
        reference.form_complete = float(outcome.form_complete[row])
        reference.solved = float(outcome.solved[row])
        reference.reads = round(float(outcome.style_rate[row]) * environment.turns)
    return played
