"""Rules for alpha on every curve that was measured, and what RL made of the alpha that the library's rule found.

    .venv/bin/python -m studies.alpha_rules      # the tables of docs/alpha.md

Curves are of two kinds: docs/results/alpha/curves.json has those of a real model, each with the alphas that RL runs had
shown to be good; the toy's come with the runs of ``python -m studies.run --groups rule --out docs/results/alpha``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_rejuv.alpha import AlphaPoint, bargain
from studies.analysis.markdown import DASH, fill_places, number, table

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "docs/results/alpha"
PAGE = ROOT / "docs/alpha.md"
TITLES = {"retail_desk": "Retail desk (toy)", "running_total": "Running total (toy)"}
# Alphas at which RL succeeded, from studies that ran before the rule was thought of.
TOY_WINDOWS = {"retail_desk": (0.3, 0.6), "running_total": (0.2, 0.45)}
SUCCESS = 0.5
ARMS = {"sft_64": "excessive SFT", "today": "fusion, alpha auto", "today_reset": "the same + reset 2 %"}

Values = NDArray[np.float64]
# From alphas, the demonstrations' and the base samples' likelihoods there, in nats a response, to alpha.
Rule = Callable[[Values, Values, Values], float]


@dataclass(frozen=True)
class Curve:
    """What was measured on one line.

    Args:
        name: Recipe or task.
        points: The measurements.
        window: Between which alphas RL is known to succeed.
        chose: Whether the rule was chosen with it in sight.
    """

    name: str
    points: list[AlphaPoint]
    window: tuple[float, float]
    chose: bool = False


def equal_shares(alpha: Values, taught: Values, known: Values) -> float:
    """Where both lose the same share of what they can lose: the Kalai-Smorodinsky solution."""
    lost = (taught - taught.min()) / (taught[0] - taught.min())
    forgotten = (known - known.min()) / (known[-1] - known.min())
    return float(alpha[np.argmin(np.maximum(lost, forgotten))])


def lowest_sum(alpha: Values, taught: Values, known: Values) -> float:
    """Where a demonstration and a sample together are likeliest."""
    return float(alpha[np.argmin(taught + known)])


def lowest_demonstrations(alpha: Values, taught: Values, known: Values) -> float:
    """Where demonstrations are likeliest."""
    return float(alpha[np.argmin(taught)])


def within_one_nat(alpha: Values, taught: Values, known: Values) -> float:
    """The smallest alpha at which demonstrations are at most one nat less likely than at best."""
    return float(alpha[np.argmax(taught <= taught.min() + 1)])


def one_nat_of_excess(alpha: Values, taught: Values, known: Values) -> float:
    """The largest alpha at which the base's samples are at most one nat less likely: the rule of the first release."""
    return float(alpha[np.flatnonzero(known <= known[0] + 1)[-1]])


RULES: dict[str, Rule] = {
    "equal shares": equal_shares,
    "lowest sum": lowest_sum,
    "lowest demonstrations": lowest_demonstrations,
    "demonstrations within 1 nat": within_one_nat,
    "1 nat of excess": one_nat_of_excess,
}


def of_rule(rule: Rule, points: Sequence[AlphaPoint]) -> float:
    """Apply a rule to a curve, between its points by straight lines."""
    fine = np.linspace(0, 1, 1001)
    alpha = [point.alpha for point in points]
    taught, known = (
        np.interp(fine, alpha, [getattr(point, name) for point in points])
        for name in ("demonstrations", "base_samples")
    )
    return rule(fine, taught, known)


def curves(raw: Path = RAW) -> list[Curve]:
    """Read all curves."""
    file = raw / "curves.json"
    found = [
        Curve(one["recipe"], [_point(p) for p in one["curve"]], tuple(one["window"]), one["chose"])
        for one in (json.loads(file.read_text()) if file.is_file() else [])
    ]
    for task, window in TOY_WINDOWS.items():
        for arms in toy(task, raw):
            search = arms.get("today", {}).get("search")
            if search:
                found.append(Curve(task, [_point(p) for p in search["curve"]], window))
    return found


def _point(plain: dict[str, float]) -> AlphaPoint:
    return AlphaPoint(
        plain["alpha"], plain["demonstrations"], plain["base_samples"], plain.get("format", 1.0)
    )


def toy(task: str, raw: Path = RAW) -> list[dict[str, Any]]:
    """The finished arms of every seed of one of the toy's tasks."""
    return [json.loads(file.read_text())["arms"] for file in sorted((raw / task).glob("seed_*.json"))]


def table_of_rules(found: Sequence[Curve]) -> str:
    """One row for each recipe: what every rule takes."""
    rows = []
    for name in dict.fromkeys(curve.name for curve in found):
        own = [curve for curve in found if curve.name == name]
        low, high = own[0].window
        cells = [_cell([bargain(curve.points).alpha for curve in own], low, high)]
        cells += [_cell([of_rule(rule, curve.points) for curve in own], low, high) for rule in RULES.values()]
        kind = ", chose it" if own[0].chose else ""
        seeds = f", {len(own)} seeds" if len(own) > 1 else ""
        rows.append([f"{TITLES.get(name, name)}{seeds}{kind}", f"{low:g}{DASH}{high:g}", *cells])
    return table(("line", "RL succeeds at", "**the bargain**", *RULES), rows)


def _cell(alphas: Sequence[float], low: float, high: float) -> str:
    text = number(median(alphas))
    if len(alphas) > 1:
        text += f" ({number(min(alphas))}{DASH}{number(max(alphas))})"
    return text if low <= median(alphas) <= high else f"{text} ✗"


def table_of_runs(raw: Path = RAW) -> str:
    """What RL made of the toy's starts."""
    rows = []
    for task, title in TITLES.items():
        seeds = toy(task, raw)
        for arm, name in ARMS.items():
            done = [arms[arm] for arms in seeds if arm in arms]
            if done:
                ends = [record["id"]["end"]["pass_at_1"] for record in done]
                outside = [record["ood"]["end"]["pass_at_1"] for record in done]
                succeeded = sum(end >= SUCCESS for end in ends)
                rows.append(
                    [
                        f"{title}: {name}",
                        f"{succeeded} of {len(ends)}",
                        number(fmean(ends)),
                        number(fmean(outside)),
                    ]
                )
    return table(("RL starts from", "succeed", "pass@1", "out of distribution"), rows)


def main() -> None:
    """Fill the page's tables."""
    made = {"rules": table_of_rules(curves()), "runs": table_of_runs()}
    PAGE.write_text(fill_places(PAGE.read_text(), "alpha", made))


if __name__ == "__main__":
    main()
