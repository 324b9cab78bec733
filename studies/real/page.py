"""From raw results, finished or not, to the table, the picture and the sentences of docs/real.md.

.venv/bin/python -m studies.real.page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from studies.analysis.markdown import (
    fill_places,
    listed,
    number,
    p_value,
    plus_minus,
    seed_ranges,
    signed,
    table,
)
from studies.analysis.statistics import Difference
from studies.analysis.statistics import mean as over_seeds
from studies.real.analysis import (
    ENOUGH_SEEDS,
    QUESTIONS,
    SUCCESS,
    Run,
    between,
    by_arm,
    differences,
    load,
    starts,
    verdict,
)
from studies.real.arms import ARMS, CORE
from studies.real.recipes import RECIPES
from studies.verdicts import ON_A_REAL_MODEL, confusion, confusion_table, of_real, wrong_about

ROOT = Path(__file__).resolve().parents[2]
HEADER = (
    "RL starts from",
    "runs",
    "pass@1 before",
    "pass@8",
    "equal groups",
    "format",
    "pass@1 after RL",
    "lowest, highest",
    "succeed",
    "other length",
    "reward during RL",
    "entropy",
    "forgotten",
    "core-minutes in float32",
)
# What README calls the recipes: the model that SFT starts from, and how far SFT goes.
MODELS = {"V": "a base that was taught the skill first", "X": "the pretrained model as it is"}
MODELS["W"] = f"{MODELS['V']}, SFT to the end"
# Arms that reset neurons, and what is looked at of their starts.
RESETS = ("fusion_reset", "fusion_random")
BEFORE_RL = {"pass@1": "pass_at_1", "pass@8": "pass_at_k", "format": "format"}
RESETS_HEADER = ("before RL", "neurons", "pass@1", "pass@8", "format", "worked out", "entropy")


def blocks(runs: Sequence[Run]) -> dict[str, str]:
    """What stands between the marks of the page, by name."""
    if not runs:
        nothing = "No run has finished yet."
        names = ("state", "table", "questions", "machines", "alphas", "worked")
        return {**dict.fromkeys(names, nothing), "picture": ""}
    return {
        "state": _state(runs),
        "table": _table(runs),
        "questions": _questions(runs),
        "machines": _machines(runs),
        "alphas": _alphas(runs),
        "worked": _worked(runs),
        "picture": "![Every run of RL: pass@1 before and after](images/real.png)",
    }


def _state(runs: Sequence[Run]) -> str:
    said = []
    for recipe in sorted({run.recipe for run in runs}):
        of_recipe = [run for run in runs if run.recipe == recipe]
        sft, rl = (sorted({getattr(run, name) for run in of_recipe}) for name in ("sft_seed", "rl_seed"))
        said.append(
            f"recipe {recipe}: {len(of_recipe)} run{_s(len(of_recipe))} of RL, "
            f"SFT seed{_s(len(sft))} {seed_ranges(sft)}, RL seed{_s(len(rl))} {seed_ranges(rl)}"
        )
    places = [run.end["where"] for run in runs]
    machines = listed(sorted({f"{place['device']} ({place['dtype']})" for place in places}))
    versions = listed(sorted({f"torch {p['torch']} with transformers {p['transformers']}" for p in places}))
    days = sorted({place["date"] for place in places})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(said)}. Machines: {machines}; {versions}; {when}."


def _s(count: int) -> str:
    return "s" * (count > 1)


def _table(runs: Sequence[Run]) -> str:
    rows = []
    for (recipe, arm), found in by_arm(runs).items():
        of_sft = len({run.sft_seed for run in found})
        ends = [run.pass_at_1 for run in found]
        on_cpus = [run for run in found if run.end["where"]["dtype"] == "float32"]

        def mean(moment: str, *names: str, found: Sequence[Run] = found) -> float:
            return fmean(_of_sft_seeds(found, lambda one: _at(getattr(one, moment), *names)))

        rows.append(
            [
                f"{recipe}: {ARMS[arm].title}",
                f"{len(found)} ({of_sft} SFT seed{_s(of_sft)})",
                number(mean("start", "id", "pass_at_1")),
                number(mean("start", "id", "pass_at_k")),
                number(mean("start", "id", "zero_variance")),
                number(mean("start", "id", "format")),
                f"**{_over_sft_seeds(found)}**",
                f"{number(min(ends))}, {number(max(ends))}",
                f"{sum(end >= SUCCESS for end in ends)} of {len(ends)}",
                number(mean("end", "ood", "pass_at_1")),
                number(fmean(_of_sft_seeds(found, lambda run: run.reward))),
                number(mean("end", "id", "entropy")),
                number(mean("end", "knowledge", "excess_nll")),
                number(mean("end", "processor_seconds", found=on_cpus) / 60 if on_cpus else None, 0),
            ]
        )
    return table(HEADER, rows)


def _over_sft_seeds(runs: Sequence[Run]) -> str:
    """The mean over SFT seeds, each the mean over its RL seeds; with the 95 % interval if they are enough."""
    ends = _of_sft_seeds(runs, lambda run: run.pass_at_1)
    estimate = over_seeds(ends)
    return number(estimate.value) if len(ends) < ENOUGH_SEEDS else plus_minus(estimate._asdict())


def _at(value: Any, *names: str) -> float:
    for name in names:
        value = value[name]
    return float(value)


def _questions(runs: Sequence[Run], primary_only: bool = False) -> str:
    lines = []
    for question, end, during in differences(runs):
        if primary_only and not question.primary:
            continue
        n = end.estimate.n
        lines.append(
            f"- {question.text}: {signed(end.estimate._asdict())} pass@1 after RL "
            f"({n} SFT seed{_s(n)}, {_signs(end)}): {verdict(end)}. "
            f"Mean reward during RL: {signed(during.estimate._asdict())}."
        )
    return "\n".join(lines) or "No two arms share a run yet."


def _signs(found: Difference) -> str:
    tested = "" if found.p is None else f", p = {p_value(found.p)}"
    return f"{found.wins} above and {found.losses} below{tested}"


def _starts(directory: Path) -> str:
    """What a reset does to the start: the differences that have one on one side, before RL."""
    lines, found_starts = [], starts(directory)
    for question in QUESTIONS:
        if not {question.ours, question.theirs} & set(RESETS):
            continue
        said = []
        for measure, name in BEFORE_RL.items():
            ours, theirs = (
                {seed: _at(of, arm, "id", name) for seed, of in found_starts.items() if arm in of}
                for arm in (question.ours, question.theirs)
            )
            if (found := between(ours, theirs)) is not None:
                said.append(f"{measure} {signed(found.estimate._asdict())} ({_signs(found)})")
        if said:
            lines.append(f"- {question.text}: {'; '.join(said)}.")
    return "\n".join(lines) or "No reset has been run yet."


def _machines(runs: Sequence[Run]) -> str:
    """The primary differences on each kind of machine: an SFT seed lies wholly on one."""
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.end["where"]["dtype"], []).append(run)
    if len(kinds) < 2:
        return "All runs are of one kind of machine so far."
    parts = [f"In {kind}:\n\n{_questions(kinds[kind], primary_only=True)}" for kind in sorted(kinds)]
    return "\n\n".join(parts)


def _alphas(runs: Sequence[Run]) -> str:
    found = {(run.recipe, run.sft_seed): run.start["edit"]["alpha"] for run in runs if run.arm == "fusion"}
    of = {recipe: [a for (r, _), a in sorted(found.items()) if r == recipe] for recipe in RECIPES}
    said = [
        f"{recipe}: {', '.join(number(alpha) for alpha in alphas)}" for recipe, alphas in of.items() if alphas
    ]
    return "; ".join(said) or "No alpha was searched for yet."


def _worked(runs: Sequence[Run]) -> str:
    """How many answers are worked out before and after RL from excessive SFT, a row for each run."""
    rows = []
    for run in runs:
        if run.arm == "excessive":
            before, after = (_at(moment, "id", "worked") for moment in (run.start, run.end))
            name = f"{run.recipe} {run.sft_seed}, RL {run.rl_seed}"
            rows.append([name, number(before, 3), number(after, 3), number(run.pass_at_1)])
    header = ("excessive SFT", "worked out before RL", "after RL", "pass@1 after RL")
    return table(header, rows) if rows else "No run from excessive SFT has finished yet."


def summary(root: Path) -> str:
    """The core arms before and after RL, means over SFT seeds: README's table."""
    runs = [run for name in ("real", "real_to_the_end") for run in load(root / "docs" / "results" / name)]
    recipes = [recipe for recipe in MODELS if any(run.recipe == recipe for run in runs)]
    rows = []
    for arm in CORE:
        cells = []
        for recipe in recipes:
            found = [run for run in runs if (run.recipe, run.arm) == (recipe, arm)]
            if found:
                before = fmean(_of_sft_seeds(found, lambda run: _at(run.start, "id", "pass_at_1")))
                after = fmean(_of_sft_seeds(found, lambda run: run.pass_at_1))
                seeds = len({run.sft_seed for run in found})
                cells.append(f"{number(before)} → **{number(after)}** ({seeds} SFT seed{_s(seeds)})")
            else:
                cells.append("not run yet")
        rows.append([ARMS[arm].title, *cells])
    return table(("RL starts from", *(MODELS[recipe] for recipe in recipes)), rows)


def _of_sft_seeds(runs: Sequence[Run], value: Callable[[Run], float]) -> list[float]:
    """A value for each SFT seed: the mean over its RL seeds."""
    values: dict[int, list[float]] = {}
    for run in runs:
        values.setdefault(run.sft_seed, []).append(value(run))
    return [fmean(of_seed) for of_seed in values.values()]


def made_of(root: Path) -> dict[str, str]:
    """Everything that the page takes from the raw results below a root, by name.

    What is of the recipe that takes SFT to the end, which is never pooled with others, has ``end `` before its name.
    """
    results = root / "docs" / "results"
    to_the_end = blocks(load(results / "real_to_the_end"))
    return {
        **blocks(load(results / "real")),
        **{f"end {name}": to_the_end[name] for name in ("state", "table", "questions", "alphas", "worked")},
        "starts": _starts(results / "real"),
        "end starts": _starts(results / "real_to_the_end"),
        "verdicts": _verdicts(root),
        "resets": _resets(results / "real_resets"),
    }


def _resets(directory: Path) -> str:
    """A row for each reset that was looked at without RL."""
    lines = [
        json.loads(line)
        for path in sorted(directory.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    rows = [
        [
            f"{line['recipe']} {line['sft_seed']}, alpha {line['alpha']:g}: {line['reset']}",
            f"{line['neurons_reset']:,}",
            *(number(line[name]) for name in ("pass_at_1", "pass_at_k", "format", "worked", "entropy")),
        ]
        for line in lines
    ]
    return table(RESETS_HEADER, rows) if rows else "None was looked at yet."


def _verdicts(root: Path) -> str:
    """What the library's verdict said of the starts of this study and of the lines for alpha."""
    results = root / "docs" / "results"
    found = [start for name in ON_A_REAL_MODEL for start in of_real(results / name)]
    if not found:
        return "No run has finished yet."
    return "\n".join(
        [confusion_table({"all": confusion(found)}), *(f"\n{line}" for line in wrong_about(found))]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Update the page, its picture and README's table."""
    parser = argparse.ArgumentParser(prog="python -m studies.real.page", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    root = parser.parse_args(arguments).root
    runs = load(root / "docs" / "results" / "real")
    page, readme = root / "docs" / "real.md", root / "README.md"
    page.write_text(fill_places(page.read_text(), "real", made_of(root)))
    if runs:
        readme.write_text(fill_places(readme.read_text(), "real", {"summary": summary(root)}))
        from studies.real.picture import draw

        draw([*runs, *load(root / "docs" / "results" / "real_to_the_end")]).savefig(
            root / "docs" / "images" / "real.png", metadata={"Software": None}
        )
    print(f"{len(runs)} runs of RL.")


if __name__ == "__main__":
    main()
