"""What the library's verdict says of a start, against what RL made of it.

    .venv/bin/python -m studies.verdicts

It prints one table for each set of raw results: those of the study; those on a real model, to which the verdict was not
fitted (`ON_A_REAL_MODEL`); and the notes that the verdict was made with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lightning_rejuv.verdict import Level, judge
from studies.analysis.forecast import Start, starts
from studies.analysis.markdown import table
from studies.analysis.results import load

ROOT = Path(__file__).resolve().parents[1]
ON_A_REAL_MODEL = ("real", "real_to_the_end", "alpha/real")  # below docs/results
LEVELS: tuple[Level, ...] = get_args(Level)
SUCCESS_ON_A_REAL_MODEL = (
    0.25  # pass@1 after RL; from the plan of studies/real, which was written before its runs
)

# The study's measures by the names that the verdict knows them by; zero-variance groups are of the first RL step.
MEASURES = {
    "pass_at_1": "pass_at_1",
    "pass_at_8": "pass_at_8",
    "zero_variance_groups": "zero_variance_fraction",
    "token_entropy": "token_entropy",
}
# How often a response with the closing form would be right for another problem: one digit of ten, in the
# running total and in the one record of the price desk; a whole database.
CHANCE = {"retail_desk": 0.0, "running_total": 0.1, "price_desk": 0.1}
OF_ROLLOUTS = ("pass_at_1", "pass_at_8", "zero_variance_fraction")


class Judged(NamedTuple):
    """A start, what the verdict says of it, and whether RL succeeded from there."""

    name: str
    level: Level
    succeeded: bool


class Noted(NamedTuple):
    """A start of the notes on SmolLM2-135M: one seed each, 32 problems x 8 responses.

    Args:
        name: Recipe and start.
        pass_at_1: Before RL.
        pass_at_8: The same.
        zero_variance: Share of groups, before RL; None where it was not written down.
        entropy_ratio: Token entropy on held-out demonstrations over the base's; None where it was not measured.
        calibration: Token entropy over what these demonstrations cost, of the same recipe trained once more; the same.
        after: Pass@1 after RL; of several RL seeds the mean.
    """

    name: str
    pass_at_1: float
    pass_at_8: float
    zero_variance: float | None
    entropy_ratio: float | None
    calibration: float | None
    after: float


NOTES = (
    Noted("V, base", 0.0, 0.0, 1.0, 1.0, None, 0.0),
    Noted("V, moderate SFT", 0.26, 0.75, 0.25, 0.66, 0.83, 0.61),
    Noted("V, moderate SFT, seed 2", 0.25, 0.75, 0.25, None, None, 0.54),
    Noted("V, excessive SFT", 0.08, 0.16, 0.91, 0.14, 0.11, 0.065),
    Noted("V, excessive SFT, seed 2", 0.12, 0.13, 0.97, None, None, 0.14),
    Noted("V, fusion .5", 0.45, 0.84, 0.19, 0.41, 0.40, 0.545),
    Noted("V, fusion .5, seed 2", 0.39, 0.84, 0.19, None, None, 0.52),
    Noted("V, fusion .4", 0.21, 0.69, 0.31, 0.48, 0.39, 0.66),
    Noted("V, fusion .5 + reset", 0.40, 0.78, 0.25, 0.50, None, 0.68),
    Noted("V, fusion .5 + reset, seed 2", 0.38, 0.84, 0.16, None, None, 0.56),
    Noted("V, fusion .5 + random neurons", 0.45, 0.84, 0.19, None, None, 0.685),
    Noted("V, fusion .4 + reset", 0.09, 0.47, 0.53, None, None, 0.67),
    Noted("V, fusion .28 + reset", 0.0, 0.0, 1.0, 0.77, None, 0.0),
    Noted("X, base", 0.0, 0.0, 1.0, 1.0, None, 0.0),
    Noted("X, moderate SFT", 0.17, 0.56, 0.44, 0.16, 0.81, 0.28),
    Noted("X, excessive SFT", 0.00, 0.03, 0.97, 0.04, 0.13, 0.05),
    Noted("X, fusion .5", 0.10, 0.38, 0.63, 0.09, 0.44, 0.47),
    Noted("X, fusion .4", 0.11, 0.63, None, 0.15, 0.67, 0.41),
    Noted("X, fusion .3", 0.05, 0.28, 0.72, 0.24, 0.80, 0.34),
)


def of_notes() -> list[Judged]:
    """The starts of the notes."""
    found = []
    for start in NOTES:
        values = {
            "pass_at_1": start.pass_at_1,
            "pass_at_8": start.pass_at_8,
            "zero_variance_fraction": start.zero_variance,
            "token_entropy": start.entropy_ratio,
            "token_nll": start.entropy_ratio / start.calibration
            if start.entropy_ratio and start.calibration
            else None,
        }
        known = {name: value for name, value in values.items() if value is not None}
        level = judge(known, {"token_entropy": 1.0}).level
        found.append(Judged(start.name, level, start.after >= SUCCESS_ON_A_REAL_MODEL))
    return found


def of_start(start: Start, rollouts: bool = True) -> Judged:
    """A start of the study.

    Args:
        start: Its measures and what became of it.
        rollouts: Whether the verdict is told what its rollouts were worth, or the entropies alone.
    """
    values = {MEASURES[name]: start.measures[name] for name in MEASURES if name in start.measures}
    if rollouts:
        values["chance_pass_at_1"] = CHANCE.get(start.task, 0.0) * start.form_rate
    else:
        values = {name: value for name, value in values.items() if name not in OF_ROLLOUTS}
    ratio = start.measures.get("token_entropy_ratio")
    base = {"token_entropy": values["token_entropy"] / ratio} if ratio else None
    return Judged(f"{start.task} {start.seed} {start.arm}", judge(values, base).level, start.success)


def of_real(directory: Path) -> list[Judged]:
    """Starts of the study on a real model that got the standard RL, once for each RL seed.

    Arms with another RL share a start with one of these and are left out.

    Args:
        directory: Holds ``<recipe>/seed_<n>.json``.
    """
    found = []
    for path in sorted(directory.glob("*/seed_*.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        for arm, runs in content["arms"].items():
            if arm not in content["starts"]:
                continue
            before = content["starts"][arm]["id"]
            values = {
                "pass_at_1": before["pass_at_1"],
                "pass_at_8": before["pass_at_k"],
                "zero_variance_fraction": before["zero_variance"],
                "rollout_groups": content["settings"]["evaluation"][0],
            }
            for seed, run in runs.items():
                name = f"{content['recipe']} {content['sft_seed']} {arm} {seed}"
                after = run["id"]["pass_at_1"]
                found.append(Judged(name, judge(values).level, after >= SUCCESS_ON_A_REAL_MODEL))
    return found


def confusion(judged: Iterable[Judged]) -> dict[str, list[int]]:
    """How many starts of each level succeeded, and how many failed."""
    counts: dict[str, list[int]] = {level: [0, 0] for level in LEVELS}
    for start in judged:
        counts[start.level][not start.succeeded] += 1
    return counts


def confusion_table(columns: Mapping[str, Mapping[str, list[int]]]) -> str:
    """Levels by outcome; levels that no start has are left out.

    Args:
        columns: For each heading what :func:`confusion` found.
    """
    header = ["verdict before RL", *(f"{name}: {end}" for name in columns for end in ("succeeded", "failed"))]
    rows = [
        [level, *(str(count) for found in columns.values() for count in found[level])]
        for level in LEVELS
        if any(sum(found[level]) for found in columns.values())
    ]
    return table(header, rows)


def main(study: Path, real: Iterable[Path]) -> None:
    """Print the tables."""
    for task in load(study).values():
        found = starts([task])
        told = {"with rollouts": confusion(map(of_start, found))}
        told["without"] = confusion(of_start(start, rollouts=False) for start in found)
        print(f"{task.title}\n\n{confusion_table(told)}\n")
    print(f"The notes on SmolLM2-135M\n\n{confusion_table({'all': confusion(of_notes())})}\n")
    found = [start for directory in real for start in of_real(directory)]
    if found:
        print(f"On a real model\n\n{confusion_table({'all': confusion(found)})}\n")
        print("\n".join(wrong_about(found)))


def wrong_about(found: Iterable[Judged]) -> list[str]:
    """The starts that were called healthy and failed, or something else and succeeded, a line each."""
    return [
        f"{start.name}: {start.level}, {_outcome(start)}"
        for start in found
        if (start.level == "healthy") is not start.succeeded
    ]


def _outcome(start: Judged) -> str:
    return "RL succeeded" if start.succeeded else "RL failed"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m studies.verdicts", description=__doc__)
    results = ROOT / "docs" / "results"
    parser.add_argument("--study", type=Path, default=results / "study", help="raw results of the study")
    on_a_real_model = [results / name for name in ON_A_REAL_MODEL]
    parser.add_argument("--real", type=Path, nargs="+", default=on_a_real_model, help="those on a real model")
    options = parser.parse_args()
    main(options.study, options.real)
