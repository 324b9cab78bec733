"""The four arms of the demo: how they are called and drawn, everywhere the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One starting point of RL.

    Args:
        title: What it is, in words.
        color: Its colour in every figure (Okabe–Ito, told apart by colour-blind readers).
    """

    title: str
    color: str


ARMS: dict[str, Arm] = {
    "base": Arm("base", "#8c8c8c"),
    "modsft": Arm("moderate SFT", "#56b4e9"),
    "oversft": Arm("excessive SFT", "#d55e00"),
    "rejuvenated": Arm("excessive SFT, rejuvenated", "#009e73"),
}
