"""Rules for alpha on every curve that was measured, and what RL made of the alpha that the library's rule found.

    .venv/bin/python -m studies.alpha_rules      # the tables of docs/alpha.md

Curves of recipes V and X come with docs/results/real, one for each SFT seed; those of L and R with the RL runs along
their lines, arms `studies.real.arms.LINE` of ``python -m studies.real.run --recipes L R --seeds 101 --rl-seeds 201
--out docs/results/alpha/real``; the toy's with the runs of ``python -m studies.run --groups rule --out
docs/results/alpha``. That of A is in docs/results/alpha/curves.json: a script from before studies/real measured it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_rejuv.alpha.search import FIRST, USUAL_ALPHA, AlphaPoint, choose_alpha, is_clear, shares_at
from studies.analysis.markdown import DASH, fill_places, number, table
from studies.files import read_seeds
from studies.real import analysis as real
from studies.real.arms import ARMS as REAL_ARMS

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "docs/results/alpha"
PAGE = ROOT / "docs/alpha.md"
TITLES = {"retail_desk": "Retail desk (toy)", "running_total": "Running total (toy)"}
# Alphas at which RL succeeded, from runs on other seeds that were made before the rule was thought of.
TOY_WINDOWS = {"retail_desk": (0.3, 0.6), "running_total": (0.2, 0.45)}
REAL_WINDOWS = {"V": (0.4, 0.55), "X": (0.3, 0.5)}
SUCCESS = 0.5
ARMS = {
    "sft_64": "excessive SFT",
    "fusion_40": "fusion, alpha 0.4",
    "bargain": "fusion, the bargain's alpha",
    "bargain_reset": "the same + reset 2 %",
}

Values = NDArray[np.float64]
Windows = tuple[tuple[float, float], ...]
# From alphas, the demonstrations' and the base samples' likelihoods there, in nats a response, to alpha.
Rule = Callable[[Values, Values, Values], float]


@dataclass(frozen=True)
class Curve:
    """What was measured on one line.

    Args:
        name: Recipe or task.
        points: The measurements.
        windows: Between which alphas RL is known to succeed, each with its ends.
        tests: Whether it was made to test the rule, and not known when that was chosen.
    """

    name: str
    points: list[AlphaPoint]
    windows: Windows
    tests: bool = False


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
    found = [
        Curve(recipe, _points(search["curve"]), (REAL_WINDOWS[recipe],)) for recipe, search in searches(raw)
    ]
    file = raw / "curves.json"
    for one in json.loads(file.read_text()) if file.is_file() else []:
        found.append(Curve(one["recipe"], _points(one["curve"]), (tuple(one["window"]),)))
    for runs in lines(raw):
        (search,) = (run.start["edit"]["search"] for run in runs if run.arm == "fusion")
        if found_windows := windows(runs):
            found.append(Curve(runs[0].recipe, _points(search["curve"]), found_windows, True))
    for task, toy_window in TOY_WINDOWS.items():
        for arms in toy(task, raw):
            search = arms.get("bargain", {}).get("search")
            if search:
                found.append(Curve(task, _points(search["curve"]), (toy_window,)))
    return found


def _points(curve: Sequence[dict[str, float]]) -> list[AlphaPoint]:
    return [
        AlphaPoint(point["alpha"], point["demonstrations"], point["base_samples"], point.get("format", 1.0))
        for point in curve
    ]


def searches(raw: Path = RAW) -> list[tuple[str, dict[str, Any]]]:
    """The study's searches of alpha on a real model, in order of recipe and SFT seed, each with its recipe."""
    starts = [
        (content["recipe"], content["starts"].get("fusion"))
        for path in sorted(raw.parent.glob("real/*/seed_*.json"))
        for content in [json.loads(path.read_text())]
    ]
    return [(recipe, start["edit"]["search"]) for recipe, start in starts if start]


def toy(task: str, raw: Path = RAW) -> list[dict[str, Any]]:
    """The finished arms of every seed of one of the toy's tasks."""
    return [content["arms"] for content in read_seeds(raw / f"{task}.jsonl").values()]


def lines(raw: Path = RAW) -> list[list[real.Run]]:
    """The recipes of a real model whose line was run, each with its runs of RL, in order of alpha."""
    runs = [run for run in real.load(raw / "real") if run.arm == "excessive" or run.start["edit"]]
    recipes = dict.fromkeys(run.recipe for run in runs if run.arm == "fusion")
    return [sorted((run for run in runs if run.recipe == recipe), key=alpha_of) for recipe in recipes]


def alpha_of(run: real.Run) -> float:
    """Where on the line a run of RL started."""
    return float(run.start["edit"]["alpha"]) if run.start["edit"] else 1.0


def windows(runs: Sequence[real.Run]) -> Windows:
    """Between which alphas RL succeeded: at .25, and at half of the line's best; between neighbours that did, all do.

    The plan of studies/real defines it. There are none if RL succeeds nowhere, or from the excessive SFT model itself:
    then the line tests nothing.
    """
    needed = max(real.SUCCESS, max(run.pass_at_1 for run in runs) / 2)
    if any(run.pass_at_1 >= needed for run in runs if not run.start["edit"]):
        return ()
    fused = sorted((run for run in runs if run.start["edit"]), key=alpha_of)
    in_a_row = groupby(fused, lambda run: run.pass_at_1 >= needed)
    good = [[alpha_of(run) for run in neighbours] for succeeded, neighbours in in_a_row if succeeded]
    return tuple((alphas[0], alphas[-1]) for alphas in good)


def table_of_lines(raw: Path = RAW) -> str:
    """What RL made of every alpha on the lines of a real model."""
    rows = [
        [
            f"{run.recipe}: {REAL_ARMS[run.arm].title}",
            number(alpha_of(run)),
            *(number(run.start["id"][name]) for name in ("pass_at_1", "pass_at_k", "format")),
            f"**{number(run.pass_at_1)}**",
            number(run.reward),
        ]
        for runs in lines(raw)
        for run in runs
    ]
    header = (
        "RL starts from",
        "alpha",
        "pass@1 before",
        "pass@8",
        "format",
        "pass@1 after RL",
        "reward during RL",
    )
    return table(header, rows)


def table_of_rules(found: Sequence[Curve]) -> str:
    """One row for each recipe: what every rule takes."""
    rows = []
    for name in dict.fromkeys(curve.name for curve in found):
        own = [curve for curve in found if curve.name == name]
        found_windows = own[0].windows
        chosen = [choose_alpha(curve.points) for curve in own]
        cells = [
            _cell([of.alpha for of in chosen], found_windows),
            _cell([of.bargain for of in chosen], found_windows),
        ]
        cells += [
            _cell([of_rule(rule, curve.points) for curve in own], found_windows) for rule in RULES.values()
        ]
        kind = ", a test" if own[0].tests else ""
        seeds = f", {len(own)} seeds" if len(own) > 1 else ""
        succeeds = ", ".join(
            f"{low:g}{DASH}{high:g}" if low < high else f"{low:g}" for low, high in found_windows
        )
        rows.append([f"{TITLES.get(name, name)}{seeds}{kind}", succeeds, *cells])
    return table(("line", "RL succeeds at", "**auto**", "the bargain", *RULES), rows)


def _cell(alphas: Sequence[float], inside: Windows) -> str:
    text = number(median(alphas))
    if min(alphas) < max(alphas):
        text += f" ({number(min(alphas))}{DASH}{number(max(alphas))})"
    right = any(low <= median(alphas) <= high for low, high in inside)
    return text if right else f"{text} ✗"


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


def first_looks(found: Sequence[Curve]) -> str:
    """What the points that a search looks at first say, beside all that were measured."""
    both = [([p for p in curve.points if p.alpha in FIRST], curve.points) for curve in found]
    same = sum(choose_alpha(first).alpha == choose_alpha(points).alpha for first, points in both)
    lower = max(_usual(first) - _usual(points) for first, points in both)
    clear = sum(is_clear(first) for first, _ in both)
    return (
        f"On {len(found)} measured lines the six say the alpha that all ten say {same} times, and are enough {clear} "
        f"times; the product at {USUAL_ALPHA:g}, in parts of the largest, is lower by at most {lower:.3f} if all ten "
        "are looked at."
    )


def _usual(points: Sequence[AlphaPoint]) -> float:
    """The product of the shares at the usual alpha, in parts of the largest at a measured one."""
    products = [prod(shares_at(points, point.alpha)) for point in points]
    return prod(shares_at(points, USUAL_ALPHA)) / max(products)


def tables() -> dict[str, str]:
    """What stands between the marks of the page, by name."""
    return {
        "rules": table_of_rules(curves()),
        "lines": table_of_lines(),
        "runs": table_of_runs(),
        "few": first_looks(curves()),
    }


def main() -> None:
    """Fill the page's tables."""
    PAGE.write_text(fill_places(PAGE.read_text(), "alpha", tables()))


if __name__ == "__main__":
    main()
