from __future__ import annotations

import json
import re

import pytest

from studies.analysis.__main__ import ROOT, main
from studies.analysis.markdown import DASH, NONE
from studies.analysis.page import NOT_YET, OF_OTHER_RESULTS, PLACE, blocks, filled, pages
from studies.analysis.reset_tables import WHERE
from studies.analysis.results import SECOND_EDITION, load
from studies.analysis.summary import summarise
from studies.arms import ARMS
from tests.studies.analysis.made_up import CUTS, record, rows, study, write

TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in pages(ROOT)}
NUMBER = re.compile(r"\d+\.\d+")


def _summary(root):
    results = root / "docs" / "results"
    return summarise(load(results / "study"), results)


# The forecast's bootstrap takes the time: a whole study is summarised once.
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    study(root, seeds=[*range(1001, 1005), *range(1021, 1025)])
    return _summary(root)


def test_tables_of_a_partly_finished_study(tmp_path):
    for seed, reset in ((1001, 0.92), (1002, 0.88), (1003, 0.90)):
        arms = {"auto_reset": record(reset, alpha=0.4), "sft_64": record(0.30)}
        if seed < 1003:
            arms["sft_8"] = record(0.90)
        write(tmp_path, "retail_desk", seed, arms)
    write(tmp_path, "running_total", 1001, {"base": record(0.0)})
    made = blocks(_summary(tmp_path))

    main_rows = rows(made["main retail_desk"])
    row = main_rows["alpha auto + reset, 2 % (`auto_reset`)"]
    assert row["n"] == "3"
    assert row["ID start → end"] == "0.10 → 0.90 ± 0.05"  # t(2) = 4.303, standard error 0.01155
    assert (row["ID gain"], row["successes"]) == ("+0.80", "3/3")
    assert row["success rate"] == "1.00 [0.44, 1.00]"
    assert main_rows["moderate SFT (`sft_8`)"]["n"] == "2"
    assert "base (`base`)" not in main_rows

    checks = rows(made["checks auto_reset"])
    assert checks["SFT, 64 epochs (`sft_64`)"]["Retail desk, ID"] == f"**+0.60 ± 0.05** (3{DASH}0 of 3) pass†"
    moderate = checks["moderate SFT (`sft_8`, `sft_2`) (at least as good)"]["Retail desk, ID"]
    assert moderate == f"0.00 ± 0.25 (1{DASH}1 of 2) pass"  # t(1) = 12.706, standard error 0.02
    assert checks["moderate SFT (`sft_8`, `sft_2`) (at least as good)"]["Running total, ID"] == NONE

    assert made["findings reset"].count("no seed has both yet") == 5
    assert (
        "Retail desk: in fewer seeds than planned: `sft_8` 2/40, `sft_64` 3/40, `auto_reset` 3/20."
        in (made["state"])
    )
    assert "Running total: not run: `sft_1`" in made["state"]
    assert made["checks auto_nll_100"].count("\n") == 1  # a heading without rows


def test_every_number_of_the_reset_table(tmp_path):
    for seed, ours, theirs in ((1001, 0.9, 0.2), (1002, 0.8, 0.3), (1003, 0.2, 0.3)):
        write(tmp_path, "retail_desk", seed, {"rigid_reset": record(ours), "rigid_random": record(theirs)})
    (row,) = rows(blocks(_summary(tmp_path))["confirmatory"]).values()
    assert row["ID end"] == "+0.37 ± 1.03"  # differences .7, .5, -.1: standard error .2404, t(2) = 4.303
    assert (row["n"], row[f"wins{DASH}losses"], row["task"]) == ("3", f"2{DASH}1", "Retail desk")
    assert row["p"] == row["p, Holm"] == "0.500"  # 4 of the 8 sign patterns are as far from 0


def test_whole_study(whole):
    """Every block is made, every table is rectangular, and what the made-up rule was is found."""
    json.dumps(whole, allow_nan=False)
    made = blocks(whole)
    for block in made.values():
        for part in block.split("\n\n"):
            if part.startswith("|"):
                rows(part)
    side = whole["forecast"]["over_trained"]["running_total"]["measures"]["support"]
    assert side["threshold"]["value"] == pytest.approx(CUTS["running_total"], abs=0.3)
    assert side["roc_auc_held_out"]["value"] > 0.99
    assert "an inverted U" in made["findings alpha"]
    kinds = whole["tasks"]["retail_desk"]["arms"]["rigid_reset"]["resets"]
    assert kinds == {"0.q": 0.15873, "1.down": 0.31746, "1.k": 0.52381}


def test_every_arm_of_the_reset_has_its_row(whole):
    made = blocks(whole)
    about = {"reset", "rigid"}
    arms = [f"`{arm}`" for arm, of in ARMS.items() if of.group in about]
    assert not set(arms) - rows(made["resets retail_desk"]).keys()
    assert list(rows(made["where running_total"])) == [f"`{arm}`" for arm in WHERE]


def test_seeds_are_those_that_ran(whole):
    found = rows(blocks(whole)["seeds"])
    assert found["Retail desk"]["reported seeds"] == f"1001{DASH}1004, 1021{DASH}1024 (8)"
    assert found["Retail desk"]["tuning seeds"] == f"901{DASH}902"
    assert found["Running total"]["tuning seeds"] == NONE


def test_the_verdict_is_shown_beside_what_became_of_the_starts(tmp_path):
    """Starts of one level each, with their rollouts and by entropies alone."""
    chances = {"healthy": (0.1, 0.4), "over-confident": (0.3, 0.3), "cannot start": (0.0, 0.0)}
    for seed, end in ((1001, 0.9), (1002, 0.9), (1021, 0.1)):
        arms = {}
        for arm, level in (
            ("auto_nll_100", "healthy"),
            ("sft_64", "over-confident"),
            ("base", "cannot start"),
        ):
            one, eight = chances[level]
            arms[arm] = record(end if level == "healthy" else 0.1)
            arms[arm]["id"]["start"] |= {"pass_at_1": one, "pass_at_k": eight}
        write(tmp_path, "retail_desk", seed, arms)
    made = blocks(_summary(tmp_path))
    heads = ("Retail desk: succeeded", "Retail desk: failed")

    def counts(side):
        found = rows(made[f"verdict {side}"])
        return {level: tuple(row[head] for head in heads) for level, row in found.items()}

    assert counts("all") == {"healthy": ("2", "1"), "over-confident": ("0", "3"), "cannot start": ("0", "3")}
    assert counts("without_rollouts") == {"unknown": ("2", "7")}


def test_filling_twice_changes_nothing(tmp_path):
    study(tmp_path, seeds=range(1001, 1004), keep=lambda task, seed, arm: arm in ("base", "sft_64"))
    summary = _summary(tmp_path)
    once = filled("a <!-- study: state -->old<!-- end --> b\n<!-- study: seeds -->\n<!-- end -->\n", summary)
    assert once.startswith("a <!-- study: state -->**The study is not finished**")
    assert "<!-- study: seeds -->\n| task |" in once
    assert "|\n<!-- end -->" in once
    assert filled(once, summary) == once
    with pytest.raises(ValueError, match="'moon'"):
        filled("<!-- study: moon --><!-- end -->", summary)


def test_command(tmp_path, capsys):
    """One command: figures and page, from a study whose second task has hardly begun."""
    arms = {"base", "sft_8", "sft_64", "fusion_30", "auto_nll_100", "auto_reset", "rigid", "rigid_reset"}
    study(
        tmp_path,
        seeds=range(1001, 1005),
        keep=lambda task, seed, arm: arm in arms and (task == "retail_desk" or seed == 1001),
    )
    (tmp_path / "docs" / "images").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(PLACE.sub(r"<!-- study: \1 --><!-- end -->", text))
    main(tmp_path)
    assert "Retail desk: 4 seeds, 8 arms, 32 runs of RL" in capsys.readouterr().out
    summary = _summary(tmp_path)
    for name, text in TEXTS.items():
        page = (tmp_path / name).read_text()
        assert page == filled(text, summary)
        assert not re.search(r"<!-- study: (main|checks).*?--><!-- end -->", page)
    pictures = list((tmp_path / "docs" / "images").iterdir())
    shown = set(re.findall(r"images/(study-[\w-]+\.png)", "".join(TEXTS.values())))
    assert {picture.name for picture in pictures} == shown - {"study-second.png"}  # that has no results here
    assert all(picture.stat().st_size < 300_000 for picture in pictures)


def test_command_without_results(tmp_path):
    with pytest.raises(SystemExit, match="found none"):
        main(tmp_path)


def test_a_place_of_other_results_waits_for_them(whole):
    found = filled("<!-- study: landscape state --><!-- end -->", {**whole, "landscape": None})
    assert NOT_YET in found


def test_nothing_that_is_made_is_left_out(whole):
    """Every table has its place in one of the pages."""
    placed = {name for text in TEXTS.values() for name in PLACE.findall(text)}
    assert not {name for name in blocks(whole) if not name.startswith(OF_OTHER_RESULTS)} - placed


@pytest.fixture(scope="module")
def of_docs():
    return _summary(ROOT), load(ROOT / "docs" / "results" / "second", SECOND_EDITION)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_the_pages_say_what_the_raw_results_say(of_docs, name):
    """But for a last digit, which may differ from machine to machine."""
    text = TEXTS[name]
    made = filled(text, *of_docs)
    assert NUMBER.sub("#", made) == NUMBER.sub("#", text), "run `python -m studies.analysis`"
    assert NOT_YET not in made
    for ours, kept in zip(NUMBER.findall(made), NUMBER.findall(text), strict=True):
        digits = len(kept.partition(".")[2])
        assert float(ours) == pytest.approx(float(kept), abs=1.01 * 10**-digits), (
            "run `python -m studies.analysis`"
        )
