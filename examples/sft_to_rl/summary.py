"""From the seeds' results to the summary: means over seeds with every seed beside them, and what they say."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from statistics import fmean
from typing import Any

from examples.sft_to_rl.arms import ARMS
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import TASKS

SPLITS = ("id", "ood")
SUCCESS = 0.5  # a seed has succeeded if it ends at this pass@1 or above, in distribution
NEAR = 0.1  # an arm whose mean pass@1 moves by less than this "stays where it started"
CLEAR = 0.3  # a difference of end points that is called clear


def summarise(
    results: Sequence[dict[str, Any]], settings: Settings, seconds: float, miniature: bool = False
) -> dict[str, Any]:
    """Build the summary from what `run_seed` returned for every seed of every task.

    The first task is the main one: its arms stand at the top, and under ``tasks`` with those of the others.
    """
    names = list(dict.fromkeys(result["task"] for result in results))
    tasks = {
        name: _summarise_task([r for r in results if r["task"] == name], settings.rl_budget) for name in names
    }
    packages = ("torch", "lightning", "torchmetrics", "transformers", "lightning-rejuv")
    return {
        "task": names[0],
        **tasks[names[0]],
        "tasks": tasks,
        "miniature": miniature,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seconds": round(seconds, 1),
    }


def _summarise_task(results: Sequence[dict[str, Any]], rl_budget: int) -> dict[str, Any]:
    seeds = sorted(results, key=lambda result: result["seed"])
    return {
        "seeds": len(seeds),
        "seed_numbers": [result["seed"] for result in seeds],
        "rl_budget": rl_budget,
        "arms": {arm: _summarise_arm(arm, seeds) for arm in ARMS},
        "sft": [{"seed": result["seed"], **result["sft"]} for result in seeds],
        "stage_seconds": [{"seed": result["seed"], **result["seconds"]} for result in seeds],
    }


def _summarise_arm(arm: str, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    per_seed = [{"seed": result["seed"], **result["arms"][arm]} for result in seeds]
    means = {
        split: {
            moment: fmean(result[split][moment]["pass_at_1"] for result in per_seed)
            for moment in ("start", "end")
        }
        for split in SPLITS
    }
    return {
        **means,
        "successes": sum(result["id"]["end"]["pass_at_1"] >= SUCCESS for result in per_seed),
        "form_rate_end": fmean(result["id"]["end"]["form_rate"] for result in per_seed),
        "seconds": fmean(result["seconds"] for result in per_seed),
        "per_seed": per_seed,
    }


def differences(summary: dict[str, Any], split: str) -> list[float]:
    """End point of the rejuvenated arm minus that of the excessive one, seed by seed."""
    ends = {
        arm: [result[split]["end"]["pass_at_1"] for result in summary["arms"][arm]["per_seed"]]
        for arm in ("rejuvenated", "oversft")
    }
    return [ours - theirs for ours, theirs in zip(ends["rejuvenated"], ends["oversft"], strict=True)]


def headline(summary: dict[str, Any]) -> str:
    """The finding of one task in one line, weaker where the numbers are."""
    over, ours = (summary["arms"][arm]["id"] for arm in ("oversft", "rejuvenated"))
    if min(differences(summary, "id")) > CLEAR and abs(over["end"] - over["start"]) < NEAR:
        return (
            f"After excessive SFT, RL stays at {over['end']:.0%}. "
            f"Rejuvenated first, the same checkpoint reaches {ours['end']:.0%}."
        )
    return f"After the same RL, excessive SFT ends at {over['end']:.0%}, rejuvenated at {ours['end']:.0%}."


def findings(summary: dict[str, Any]) -> list[str]:
    """What one task's numbers say, in sentences whose words depend on the numbers."""
    arms, seeds = summary["arms"], summary["seeds"]
    over, ours, base, moderate = (arms[arm] for arm in ("oversft", "rejuvenated", "base", "modsft"))

    change = over["id"]["end"] - over["id"]["start"]
    verb = "stays where it started" if abs(change) < NEAR else ("improves" if change > 0 else "falls")
    moves = [f"{over[split]['start']:.2f} -> {over[split]['end']:.2f}" for split in SPLITS]
    first = (
        f"Excessive SFT {verb} under RL: {moves[0]} in distribution, {moves[1]} out of it; "
        f"{over['successes']} of {seeds} seeds reach {SUCCESS}."
    )

    gaps = {split: differences(summary, split) for split in SPLITS}
    ahead = sum(id_gap > 0 and ood_gap > 0 for id_gap, ood_gap in zip(*gaps.values(), strict=True))
    lower = ours["id"]["start"] < over["id"]["start"]
    second = (
        f"Rejuvenated, it starts {'lower' if lower else 'no lower'} ({ours['id']['start']:.2f}) and ends at "
        f"{ours['id']['end']:.2f} ({ours['ood']['end']:.2f} out of distribution), "
        f"{fmean(gaps['id']):+.2f} ({fmean(gaps['ood']):+.2f}) against excessive SFT; it is ahead on both in "
        f"{ahead} of {seeds} seeds, and {ours['successes']} of {seeds} reach {SUCCESS}."
    )

    works = "also works" if moderate["id"]["end"] > SUCCESS else "at this epoch does not work either"
    third = (
        f"RL from the base reaches {SUCCESS} in {base['successes']} of {seeds} seeds; it fills in the "
        f"closing form in {base['form_rate_end']:.1%} of its responses. From moderate SFT "
        f"{moderate['successes']} of {seeds} do, at {moderate['id']['end']:.2f} on average: stopping SFT in "
        f"time {works}. All this at {summary['rl_budget']:,} responses per arm; more RL can change it."
    )
    return [first, second, third]


def table(name: str, summary: dict[str, Any]) -> str:
    """The arms of one task as a text table."""
    seeds = ", ".join(map(str, summary["seed_numbers"]))
    columns = f"{'start':>8}{'end':>8}{'gain':>8}  "
    budget = f"{summary['rl_budget']:,}"
    lines = [
        f"{TASKS[name].title}, seeds {seeds}: pass@1 before and after RL on {budget} responses per arm",
        "",
        f"{'':28}{'in distribution':^26}{'out of distribution':^26}{'seeds':>7}{'s per':>7}  end in",
        f"{'RL from':28}{columns}{columns}{f'>= {SUCCESS}':>7}{'seed':>7}  distribution, by seed",
    ]
    lines.append("-" * len(lines[-1]))
    for arm, about in ARMS.items():
        row = summary["arms"][arm]
        points = [(row[split]["start"], row[split]["end"]) for split in SPLITS]
        cells = [f"{start:8.2f}{end:8.2f}{end - start:+8.2f}  " for start, end in points]
        successes = f"{row['successes']}/{summary['seeds']}"
        ends = " ".join(f"{result['id']['end']['pass_at_1']:.2f}" for result in row["per_seed"])
        lines.append(f"{about.title:28}{''.join(cells)}{successes:>7}{row['seconds']:7.0f}  {ends}")
    edits = [result["rejuvenation"] for result in summary["arms"]["rejuvenated"]["per_seed"]]
    alphas = ", ".join(f"{edit['alpha']:.2f}" for edit in edits)
    resets = ", ".join(str(edit["neurons_reset"]) for edit in edits)
    lines += ["", f"Rejuvenation, by seed: alpha {alphas}; neurons reset {resets}"]
    return "\n".join(lines)
