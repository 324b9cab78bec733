"""The page from made-up results, whole and partial; and the page in docs/ against the results that lie there."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from studies.analysis.markdown import DASH, MINUS, fill_places, places
from studies.real import page
from studies.real.analysis import QUESTIONS, SUCCESS, difference, differences, load
from studies.real.arms import ARMS
from studies.real.jobs import Job
from studies.real.page import blocks, main
from studies.real.recipes import RECIPES
from studies.real.record import Record, where

ROOT = Path(__file__).parents[3]
ENDS = {"excessive": 0.1, "moderate": 0.6, "fusion": 0.55, "fusion_reset": 0.6, "fusion_random": 0.58}


def _scores(value: float) -> dict:
    measures = {"pass_at_k": min(1.0, 2 * value), "zero_variance": 1 - value, "format": 0.9, "entropy": 0.3}
    measures["worked"] = value / 4
    return {
        "id": {"pass_at_1": value, **measures},
        "ood": {"pass_at_1": value / 2, **measures},
        "knowledge": {"excess_nll": 0.12, "agreement": 0.8},
    }


def _write(
    root: Path,
    recipes="VX",
    sft_seeds=(101, 102, 103),
    rl_seeds=(201, 202),
    arms=tuple(ENDS),
    dtype="float32",
    starts=None,
) -> None:
    for recipe in recipes:
        for sft_seed in sft_seeds:
            record = Record(root, RECIPES[recipe], sft_seed)
            for arm in arms:
                start = Job("start", recipe, sft_seed, ARMS[arm].start)
                record.add(
                    start,
                    {"edit": {"alpha": 0.4 + sft_seed / 10000}, **_scores((starts or {}).get(arm, 0.05))},
                )
                for rl_seed in rl_seeds:
                    noise = random.Random(f"{recipe} {sft_seed} {rl_seed} {arm}").uniform(-0.05, 0.05)
                    value = ENDS[arm] + noise + (0.2 if recipe == "X" else 0.0)
                    result = {
                        "made": ARMS[arm].recipe(),
                        **_scores(value),
                        "curves": {"reward": [0.0, 2 * value]},
                        "processor_seconds": 600.0,
                        "where": where("cpu", dtype),
                    }
                    record.add(Job("arm", recipe, sft_seed, arm, rl_seed), result)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_for_each_arm_of_each_recipe(tmp_path):
    _write(tmp_path)
    runs = load(tmp_path)
    assert len(runs) == 2 * 3 * 2 * 5
    header, _, *rows = blocks(runs)["table"].splitlines()
    assert len(rows) == 10
    assert {len(_cells(line)) for line in (header, *rows)} == {len(page.HEADER)}
    by_name = {_cells(row)[0]: dict(zip(page.HEADER, _cells(row), strict=True)) for row in rows}
    fusion = by_name["V: fusion, alpha auto"]
    ends = [run.pass_at_1 for run in runs if (run.recipe, run.arm) == ("V", "fusion")]
    assert fusion["runs"] == "6 (3 SFT seeds)"
    assert fusion["pass@1 before"] == "0.05"
    of_sft = [sum(ends[first : first + 2]) / 2 for first in (0, 2, 4)]
    half = statistics.stdev(of_sft) / 3**0.5 * 4.3027  # Student's t, two degrees of freedom, 95 %
    assert fusion["pass@1 after RL"] == f"**{sum(ends) / 6:.2f} ± {half:.2f}**"
    assert fusion["lowest, highest"] == f"{min(ends):.2f}, {max(ends):.2f}"
    assert fusion["succeed"] == "6 of 6"
    assert fusion["reward during RL"] == f"{sum(ends) / 6:.2f}"
    assert fusion["core-minutes in float32"] == "10"
    excessive = [run.pass_at_1 for run in runs if (run.recipe, run.arm) == ("X", "excessive")]
    succeed = sum(end >= SUCCESS for end in excessive)
    assert by_name["X: excessive SFT"]["succeed"] == f"{succeed} of 6"
    _, _, *worked = blocks(runs)["worked"].splitlines()
    assert _cells(worked[6])[:2] == ["X 101, RL 201", "0.013"]
    assert [_cells(row)[2] for row in worked[6:]] == [f"{end / 4:.3f}" for end in excessive]
    assert len(worked) == 12
    assert blocks(runs)["alphas"] == "V: 0.41, 0.41, 0.41; X: 0.41, 0.41, 0.41"


def test_differences_pair_seeds_and_average_over_those_of_rl(tmp_path):
    _write(tmp_path)
    runs = load(tmp_path)
    (first, end, during), second, third, *_ = differences(runs)
    assert (first.ours, first.theirs) == ("fusion", "excessive")
    value = {(run.recipe, run.sft_seed, run.rl_seed, run.arm): run.pass_at_1 for run in runs}
    expected = {
        (recipe, sft): sum(
            value[recipe, sft, rl, "fusion"] - value[recipe, sft, rl, "excessive"] for rl in (201, 202)
        )
        / 2
        for recipe in "VX"
        for sft in (101, 102, 103)
    }
    assert end.estimate.n == 6
    assert end.estimate.value == pytest.approx(sum(expected.values()) / 6)
    assert during.estimate.value == pytest.approx(end.estimate.value)  # the made-up curves average to the end
    assert end.p == pytest.approx(2 / 64)  # the smallest that six pairs can give
    assert [primary.primary for primary, *_ in (second, third)] == [True, True]
    text = blocks(runs)["questions"]
    assert text.splitlines()[0].startswith("- Fusion against excessive SFT: **+0.4")
    assert "6 SFT seeds, 6 above and 0 below, p = 0.031): above." in text.splitlines()[0]


def test_what_a_reset_does_to_the_start_is_counted_once_for_each_sft_seed(tmp_path):
    _write(tmp_path, starts={"fusion": 0.3, "fusion_reset": 0.2, "fusion_random": 0.35, "excessive": 0.9})
    # Of the third SFT seed RL has not been run.
    for recipe in "VX":
        path = tmp_path / recipe / "seed_103.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "arms": {}}))
    lines = page._starts(tmp_path).splitlines()
    # Six SFT seeds, two RL seeds each; the made-up pass@8 is twice pass@1, and the format is the same everywhere.
    assert lines[0] == (
        "- The targeted reset on top of fusion, against fusion alone: "
        f"pass@1 **{MINUS}0.10 ± 0.00** (0 above and 6 below, p = 0.031); "
        f"pass@8 **{MINUS}0.20 ± 0.00** (0 above and 6 below, p = 0.031); "
        "format 0.00 ± 0.00 (0 above and 0 below, p = 1.000)."
    )
    assert f"pass@1 **{MINUS}0.15 ± 0.00**" in lines[1]
    assert "pass@1 **+0.05 ± 0.00**" in lines[2]
    assert len(lines) == 3
    assert page._starts(tmp_path / "nowhere") == "No reset has been run yet."


def test_partial_results_say_how_many_there_are(tmp_path):
    _write(tmp_path, recipes="V", sft_seeds=(101,), rl_seeds=(201, 202), arms=("excessive", "fusion"))
    _write(tmp_path, recipes="V", sft_seeds=(102,), rl_seeds=(201,), arms=("excessive",))
    runs = load(tmp_path)
    rows = [_cells(row) for row in blocks(runs)["table"].splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        ("V: excessive SFT", "3 (2 SFT seeds)"),
        ("V: fusion, alpha auto", "2 (1 SFT seed)"),
    ]
    found = difference(runs, QUESTIONS[0], lambda run: run.pass_at_1)
    assert found.estimate.n == 1
    assert found.p is None
    assert "too few seeds to tell" in blocks(runs)["questions"]
    assert difference(runs, QUESTIONS[1], lambda run: run.pass_at_1) is None
    assert f"recipe V: 5 runs of RL, SFT seeds 101{DASH}102, RL seeds 201{DASH}202" in blocks(runs)["state"]


@pytest.mark.parametrize(("seeds", "told"), [((101, 102), False), ((101, 102, 103), True)])
def test_two_seeds_have_no_interval_however_close_they_are(tmp_path, seeds, told):
    _write(tmp_path, recipes="V", sft_seeds=seeds, arms=("excessive", "fusion"))
    question, found, _ = differences(load(tmp_path))[0]
    assert question.ours == "fusion"
    assert (found.estimate.low is not None, found.p is not None) == (told, told)
    (line,) = blocks(load(tmp_path))["questions"].splitlines()
    assert ("too few seeds to tell" not in line, "\N{PLUS-MINUS SIGN}" in line) == (told, told)


@pytest.mark.parametrize("written", [True, False])
def test_the_page_and_its_picture(tmp_path, written, capsys):
    (tmp_path / "docs" / "images").mkdir(parents=True)
    text = (ROOT / "docs" / "real.md").read_text()
    target = tmp_path / "docs" / "real.md"
    target.write_text(places("real").sub(r"<!-- real: \1 --><!-- end -->", text))
    (tmp_path / "README.md").write_text("<!-- real: summary --><!-- end -->")
    if written:
        _write(tmp_path / "docs" / "results" / "real")
        _write(tmp_path / "docs" / "results" / "real_to_the_end", recipes="W", sft_seeds=(111, 112, 113))
    main(["--root", str(tmp_path)])
    made = target.read_text()
    assert ("| verdict before RL |" in made) is written
    assert ("No run has finished yet." in made) is not written
    assert (tmp_path / "docs" / "images" / "real.png").is_file() is written
    assert ("images/real.png" in made) is written
    assert capsys.readouterr().out == f"{60 if written else 0} runs of RL.\n"
    before = made
    main(["--root", str(tmp_path)])
    assert target.read_text() == before


def test_each_kind_of_machine_has_its_own_primary_differences(tmp_path):
    _write(tmp_path, recipes="V")
    assert blocks(load(tmp_path))["machines"] == "All runs are of one kind of machine so far."
    _write(tmp_path, recipes="V", sft_seeds=(104, 105, 106), dtype="bfloat16")
    runs = load(tmp_path)
    in_bfloat16 = [run for run in runs if run.sft_seed >= 104]
    first, second = (part.splitlines() for part in blocks(runs)["machines"].split("In ")[1:])
    assert (first[0], second[0]) == ("bfloat16:", "float32:")
    lines = [line for line in first if line.startswith("- ")]
    assert lines == blocks(in_bfloat16)["questions"].splitlines()[:3]
    assert all("(3 SFT seeds" in line for line in (*lines, *second[2:]))


def test_readme_has_means_over_sft_seeds(tmp_path):
    results = tmp_path / "docs" / "results" / "real"
    _write(results, recipes="V", arms=("excessive", "fusion"))
    _write(results, recipes="V", sft_seeds=(104,), rl_seeds=(201,), arms=("excessive",))
    _write(results.with_name("real_to_the_end"), recipes="W", sft_seeds=(111,), arms=("moderate",))
    runs = load(results)
    header, _, *rows = map(_cells, page.summary(tmp_path).splitlines())
    assert header == ["RL starts from", page.MODELS["V"], page.MODELS["W"]]
    of_seed = [
        statistics.fmean(run.pass_at_1 for run in runs if (run.arm, run.sft_seed) == ("excessive", seed))
        for seed in (101, 102, 103, 104)
    ]
    assert rows[0] == [
        "excessive SFT",
        f"0.05 → **{statistics.fmean(of_seed):.2f}** (4 SFT seeds)",
        "not run yet",
    ]
    assert rows[1][:2] == ["moderate SFT", "not run yet"]
    assert rows[1][2].endswith("(1 SFT seed)")


def test_the_page_in_docs_says_what_its_results_say():
    made = page.made_of(ROOT)
    text = (ROOT / "docs" / "real.md").read_text()
    assert set(places("real").findall(text)) == set(made)
    assert fill_places(text, "real", made) == text, "run `python -m studies.real.page`"
    text = (ROOT / "README.md").read_text()
    made = {"summary": page.summary(ROOT)}
    assert fill_places(text, "real", made) == text, "run `python -m studies.real.page`"
