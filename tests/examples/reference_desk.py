"""The retail desk written a second time: one episode, characters and a dict, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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


def play(keys: str, values: str, claims: str, changes: list[int], agent: Iterable[str]) -> Reference:
    """Play one episode with the characters that the agent would write; stop when they run out."""
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

    requests = [
        f"{k}{c}{'+' if d > 0 else '-'}{abs(d)}=" for k, c, d in zip(keys, claims, changes, strict=True)
    ]
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
            if command in "#@&":
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
