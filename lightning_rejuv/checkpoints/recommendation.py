"""What a diagnosis recommends: the verdict on what was measured, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rejuv.alpha.doubts import doubt_seen, doubt_swapped
from lightning_rejuv.checkpoints.record import Record
from lightning_rejuv.verdict import Verdict, judge

if TYPE_CHECKING:
    from lightning_rejuv.checkpoints.behaviour import Behaviour


def verdict_on(behaviour: Behaviour | None) -> Verdict:
    """Ask for the monitor's verdict on what was measured; "unknown" without calibration data."""
    if behaviour is None:
        return judge({})
    return judge(behaviour.measures, {"token_entropy": behaviour.entropy_base})


def recommend(
    verdict: Verdict, behaviour: Behaviour | None, record: Record | None, unchanged: bool
) -> tuple[str, float | None]:
    """Say what to do, and with which alpha: the one that the search found, or none.

    Args:
        verdict: :func:`verdict_on` the model.
        behaviour: what the calibration data said.
        record: how it was rejuvenated before.
        unchanged: whether it has the base's weights.
    """
    if record is not None:
        return _of_rejuvenated(verdict, record), None
    if unchanged:
        more = f" {verdict.advice}" if verdict.level == "cannot start" else ""
        return f"No weight differs from the base: there is nothing to rejuvenate.{more}", None
    if behaviour is None:
        return "Nothing is recommended without calibration data: measure with `--calibration`.", None
    search = behaviour.search
    if verdict.level == "healthy":
        whole = search is not None and search.alpha == 1.0
        entropy = behaviour.entropy_base, behaviour.entropy_sft
        told = doubt_seen(behaviour.nll_sft, entropy)
        if behaviour.no_alpha is not None:
            told = (behaviour.no_alpha, *told)
        if search is not None:
            nll = search.curve[0].demonstrations, search.curve[-1].demonstrations
            told = (*doubt_swapped(nll, entropy), *told)
        return " ".join((verdict.advice, *told)), 1.0 if whole else None
    if verdict.level == "cannot start":
        diverged = verdict.deciding and verdict.deciding.advice
        return verdict.advice + " Fusion with the base would not bring it." * (not diverged), None
    if verdict.level == "unknown":
        return f"{verdict.advice} `--verifier` has them sampled and judged.", None
    doubts = " ".join(("", *behaviour.doubts))
    if search is None or search.found_nothing_right:
        return f"No alpha is recommended: take an earlier checkpoint.{doubts}", None
    found = search.alpha
    if found == 1.0:
        return (
            f"There is nothing to fuse: the search found alpha 1. Take an earlier checkpoint.{doubts}",
            found,
        )
    first = "Compare more rollouts, or rejuvenate" if verdict.level == "at risk" else "Rejuvenate"
    if (before := search.raised_from) is not None:
        why = f"`--alpha auto`, which checks no rollouts, would take {before:g}"
        return f"{first} with `--alpha {found:g}`: {why}.{doubts}", found
    return f"{first} with alpha {found:.3f}, which the search found (`--alpha auto`).{doubts}", found


def _of_rejuvenated(verdict: Verdict, record: Record) -> str:
    already, again = (
        "It is rejuvenated already",
        "rejuvenate the SFT model that it was made from with a {} alpha",
    )
    alphas = record.alpha.values() if isinstance(record.alpha, dict) else [record.alpha]
    larger = again.format("larger") if any(alpha < 1 for alpha in alphas) else "do more SFT"
    smaller = again.format("smaller") if any(alpha > 0 for alpha in alphas) else "take another base"
    if verdict.level == "unknown" or (verdict.deciding and verdict.deciding.advice):
        return f"{already}: do not rejuvenate it a second time. {verdict.advice}"
    if verdict.level == "cannot start":
        return f"{already}, and RL would have nothing to reward: {larger}."
    if verdict.level == "over-confident":
        return f"{already}, and over-confident still: {smaller}, or an earlier checkpoint of its SFT."
    start = f"{already}: start RL from it; do not rejuvenate it a second time."
    return f"{start} If RL from it does not improve, {smaller}." if verdict.level == "at risk" else start
