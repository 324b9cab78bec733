"""A made-up study on disk with known answers: nothing here was ever run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.analysis.results import PLANNED, SECOND_EDITION
from studies.files import read_seeds, seeds_as_lines

SETTINGS = {"rl_steps": 4, "prompts": 2}
VERSION = {"lightning_rejuv": "0.1.0", "torch": "2.13.0"}


def scores(pass_at_1: float) -> dict[str, float]:
    return {
        "pass_at_1": round(pass_at_1, 5),
        "pass_at_k": min(1.0, round(pass_at_1 + 0.1, 5)),
        "greedy": pass_at_1,
        "form_rate": 0.9,
        "style_rate": 0.2,
        "token_entropy": 0.3,
    }


def record(end: float, support: float = -1.0, **changes: Any) -> dict[str, Any]:
    return {
        "id": {"start": scores(0.1), "end": scores(end)},
        "ood": {"start": scores(0.05), "end": scores(max(0.0, end - 0.1))},
        "reward": [0.1, 0.2, 0.3, end],
        "rl_responses": 5120,
        "measures": {
            "support": support,
            "token_entropy": 0.1 + 0.01 * support,
            "dormant_fraction": 0.0,
            "verified_support": None,
        },
        "alpha": None,
        "neurons_reset": 0,
        "neurons_total": 0,
        "resets": {},
        "seconds": 1.0,
        "made": {},
        **changes,
    }


def write(
    root: Path,
    task: str,
    seed: int,
    arms: dict[str, dict[str, Any]],
    kind: str = "reported",
    edition: str = "study",
    **changes: Any,
) -> None:
    """Write one seed of a task, in the place of what is there of it."""
    path = root / "docs" / "results" / edition / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "task": task,
        "seed": seed,
        "kind": kind,
        "version": VERSION,
        "recipe": "0123456789ab",
        "settings": SETTINGS,
        "base_samples": {"responses": 96, "solved": 46, "tokens_per_response": 8.4},
        "arms": arms,
        **changes,
    }
    path.write_text(seeds_as_lines({**read_seeds(path), seed: content}))


def support_of(arm: str) -> float:
    """Falls along the ladder and with alpha; the base has lost nothing."""
    if arm == "base":
        return 0.0
    if arm.startswith("fusion_") and arm[7:].isdigit():
        return -10 * (int(arm[7:]) / 100) ** 2
    if arm.startswith("sft_"):
        return -0.3 * int(arm[4:]) ** 0.9
    return {"rigid": -6.0, "auto": -1.0}.get(arm.split("_")[0], -3.0)


CUTS = {"retail_desk": -5.5, "running_total": -4.0}


def end_of(arm: str, task: str, support: float, noise: float) -> float:
    """Two modes, decided by the support; without SFT, and with the remedies, no success."""
    if arm in ("base", "sft_1", "fusion_10"):
        return 0.02 + 0.01 * noise
    if arm.startswith(("entropy_", "kl_", "hot", "long")):
        return 0.3 + 0.02 * noise
    return (0.9 if support > CUTS[task] else 0.2) + 0.02 * noise


def study(
    root: Path,
    seeds: Sequence[int] = range(1001, 1009),
    tasks: Sequence[str] = ("retail_desk", "running_total"),
    keep: Callable[[str, int, str], bool] = lambda task, seed, arm: True,
) -> None:
    """Write a whole study, or the part that `keep` keeps."""
    for task in tasks:
        for seed in seeds:
            draws = np.random.default_rng([seed, len(task)])
            arms = {}
            for arm in PLANNED:
                noise = float(np.clip(draws.normal(), -2, 2))
                if not keep(task, seed, arm):
                    continue
                changes: dict[str, Any] = {}
                if arm.startswith(("fusion", "auto", "rigid", "reset")):
                    changes = {"alpha": 0.4, "neurons_total": 1568}
                if "reset" in arm or "random" in arm or arm.startswith("rigid_"):
                    changes |= {"neurons_reset": 63, "resets": {"0.q": 10, "1.k": 33, "1.down": 20}}
                support = round(support_of(arm) * (1 + 0.2 * noise), 5)
                arms[arm] = record(end_of(arm, task, support, float(draws.normal())), support, **changes)
            write(root, task, seed, arms)
    for seed in (901, 902):
        write(root, tasks[0], seed, {"base": record(0.99)}, kind="tuning")


def known(before: float, after: float, asked: float = 0.0) -> dict[str, Any]:
    """Knowledge before and after RL; that of the prices that RL asks for is higher by `asked`."""
    return {
        moment: {
            "asked": {"right": round(share + asked, 5), "probability": share},
            "unasked": {"right": share, "probability": share},
            "known": {"right": 0.35, "probability": 0.3},
        }
        for moment, share in (("start", before), ("end", after))
    }


def run(ending: float, before: float | None = None, after: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A record of the second edition; with knowledge, if `before` is given."""
    told = {} if before is None else {"knowledge": known(before, after)}
    steps = {"gradient_steps": 80, "training_steps_before_rl": 0}
    return record(ending, **{**steps, **told, **changes})


def second(
    root: Path, ends: dict[str, dict[str, Sequence[float]]], first_seed: int = 3001, **more: Any
) -> None:
    """Write ends by task and arm, one for each seed; the price desk's model knows as much as it ends at."""
    for task, arms in ends.items():
        for place in range(max(map(len, arms.values()))):
            runs = {
                arm: run(values[place], values[place] if task == "price_desk" else None, values[place] / 2)
                for arm, values in arms.items()
                if place < len(values)
            }
            seed = first_seed + place
            settings = {**SETTINGS, "task": f"PriceDesk(seed={seed})" if task == "price_desk" else "Desk()"}
            write(root, task, seed, runs, edition="second", settings=settings, **more)


def whole_second(root: Path, seeds: int = 20) -> None:
    """Every planned arm of every task, with ends that differ between arms and seeds."""
    draws = np.random.default_rng(3)
    second(
        root,
        {
            task: {
                arm: list(np.clip(draws.uniform(0.05, 0.9) + draws.normal(0, 0.06, seeds), 0, 1).round(5))
                for arm in SECOND_EDITION.planned(task)
            }
            for task in ("retail_desk", "running_total", "price_desk")
        },
    )


def rows(table: str) -> dict[str, dict[str, str]]:
    """Cells of a Markdown table by the first of its row and by their heading."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in lines} == {len(lines[0])}, "a table whose rows differ in length"
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
