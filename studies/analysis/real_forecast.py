"""What is known of a start before RL on a real model, and how well it tells which starts RL will make something of."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from studies.analysis.forecast import Start
from studies.analysis.within_recipe import by_arm, rows_of

DIRECTORIES = ("real", "real_to_the_end")  # below docs/results
SUCCESS = 0.25  # pass@1 after RL, from the plan of studies/real
ROLLOUTS = ("pass_at_1", "pass_at_k", "zero_variance", "format", "worked", "entropy", "length")


def real_starts(results: Path, directories: Sequence[str] = DIRECTORIES) -> list[Start]:
    """Starts that got the standard RL, once for each RL seed; RL seeds and arms of one SFT seed are one cluster.

    ``drift`` and ``alpha`` are recorded of edited starts; an over-trained one, from which they were made, has its drift
    from them and alpha 1. Of a moderate start neither is known.

    Args:
        results: docs/results.
        directories: Which of it, each with ``<recipe>/seed_<n>.json``.
    """
    found = []
    for path in sorted(path for name in directories for path in (results / name).glob("*/seed_*.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        edits = [start["edit"] for start in content["starts"].values() if start["edit"]]
        for arm, runs in content["arms"].items():
            if arm not in content["starts"]:
                continue
            start = content["starts"][arm]
            measures = {name: float(start["id"][name]) for name in ROLLOUTS}
            measures |= {name: float(value) for name, value in (start.get("knowledge") or {}).items()}
            if start["edit"]:
                measures |= {"alpha": start["edit"]["alpha"], "drift": start["edit"]["drift_after"]}
            elif arm == "excessive" and edits:
                measures |= {"alpha": 1.0, "drift": edits[0]["drift_before"]}
            for run in runs.values():
                end = float(run["id"]["pass_at_1"])
                found.append(
                    Start(content["recipe"], content["sft_seed"], arm, measures, end, end >= SUCCESS)
                )
    return found


def by_recipe(start: Start) -> Hashable:
    """Starts of one base and one set of demonstrations."""
    return start.task


def real_forecast_of(results: Path) -> dict[str, Any] | None:
    """What the summary holds of this; None without results."""
    found = real_starts(results)
    if not found:
        return None
    counts: dict[str, dict[str, int]] = {}
    for start in found:
        row = counts.setdefault(start.task, {"starts": 0, "successes": 0})
        row["starts"] += 1
        row["successes"] += start.success
    return {**rows_of(found, {"recipe": by_recipe, "arm": by_arm}), "recipes": counts}
