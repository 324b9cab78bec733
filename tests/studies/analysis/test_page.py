from __future__ import annotations

import json
import re

import pytest

from studies.analysis.__main__ import ROOT, main
from studies.analysis.markdown import DASH, MINUS, NONE
from studies.analysis.page import PLACE, blocks, filled
from studies.analysis.results import load
from studies.analysis.summary import summarise
from tests.studies.analysis.made_up import CUTS, record, study, write

PAGE = ROOT / "docs" / "evidence.md"
SUMMARY = ROOT / "docs" / "results" / "study" / "summary.json"


def _summary(root):
    return summarise(load(root / "docs" / "results" / "study"))


def _rows(table):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in lines} == {len(lines[0])}, "a table whose rows differ in length"
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_tables_of_a_partly_finished_study(tmp_path):
    for seed, reset in ((1001, 0.92), (1002, 0.88), (1003, 0.90)):
        arms = {"auto_reset": record(reset, alpha=0.4), "sft_64": record(0.30)}
        if seed < 1003:
            arms["sft_8"] = record(0.90)
        write(tmp_path, "retail_desk", seed, arms)
    write(tmp_path, "running_total", 1001, {"base": record(0.0)})
    made = blocks(_summary(tmp_path))

    main_rows = _rows(made["main retail_desk"])
    row = main_rows["alpha auto + reset, 2 % (`auto_reset`)"]
    assert row["n"] == "3"
    assert row["ID start → end"] == "0.10 → 0.90 ± 0.05"  # t(2) = 4.303, standard error 0.01155
    assert (row["ID gain"], row["successes"]) == ("+0.80", "3/3")
    assert row["success rate"] == "1.00 [0.44, 1.00]"
    assert main_rows["moderate SFT"]["n"] == "2"
    assert "base (`base`)" not in main_rows

    checks = _rows(made["checks auto_reset"])
    assert checks["SFT, 64 epochs (`sft_64`)"]["Retail desk, ID"] == "**+0.60 ± 0.05** (3) pass†"
    moderate = checks["moderate SFT (at least as good)"]["Retail desk, ID"]
    assert moderate == "0.00 ± 0.25 (2) pass"  # t(1) = 12.706, standard error 0.02
    assert checks["moderate SFT (at least as good)"]["Running total, ID"] == NONE

    assert made["findings reset"].count("no seed has both yet") == 5
    assert "`sft_8` 2" in made["state"]
    assert "Running total: not run: `sft_1`" in made["state"]
    assert made["checks auto_nll_100"].count("\n") == 1  # a heading without rows


def test_every_number_of_the_reset_table(tmp_path):
    for seed, ours, theirs in ((1001, 0.9, 0.2), (1002, 0.8, 0.3), (1003, 0.2, 0.3)):
        write(tmp_path, "retail_desk", seed, {"rigid_reset": record(ours), "rigid_random": record(theirs)})
    (row,) = _rows(blocks(_summary(tmp_path))["confirmatory"]).values()
    assert row["ID end"] == "+0.37 ± 1.03"  # differences .7, .5, -.1: standard error .2404, t(2) = 4.303
    assert (row["n"], row[f"wins{DASH}losses"], row["task"]) == ("3", f"2{DASH}1", "Retail desk")
    assert row["p"] == row["p, Holm"] == "0.500"  # 4 of the 8 sign patterns are as far from 0


def test_whole_study(tmp_path):
    """Every block is made, every table is rectangular, and what the made-up rule was is found."""
    study(tmp_path)
    summary = _summary(tmp_path)
    json.dumps(summary, allow_nan=False)
    made = blocks(summary)
    for block in made.values():
        if block.startswith("|"):
            _rows(block)
    side = summary["forecast"]["over_trained"]["running_total"]["measures"]["support"]
    assert side["threshold"]["value"] == pytest.approx(CUTS["running_total"], abs=0.3)
    assert side["roc_auc_held_out"]["value"] > 0.99
    assert "**yes**, 16/16 with `auto_nll_100`" in made["findings targets"]
    assert "an inverted U" in made["findings alpha"]
    assert made["state"] == "Every planned arm was run in every reported seed."
    (kinds,) = {
        tuple(row["resets"].items()) for row in [summary["tasks"]["retail_desk"]["arms"]["rigid_reset"]]
    }
    assert dict(kinds) == {"0.q": 0.15873, "1.down": 0.31746, "1.k": 0.52381}


def test_failures_are_called_failures(tmp_path):
    for seed in range(1001, 1005):
        noise = 0.01 * (seed - 1001)
        arms = {
            "auto_reset": 0.30 + noise,
            "auto_nll_100": 0.45,
            "sft_8": 0.9,
            "sft_64": 0.31,
            "base": 0.9 - noise,
        }
        write(tmp_path, "retail_desk", seed, {arm: record(end) for arm, end in arms.items()})
    made = blocks(_summary(tmp_path))
    assert _rows(made["checks auto_reset"])["base (`base`)"]["Retail desk, ID"].endswith("**fail**")
    assert "**no**, 0/4 with `auto_nll_100`" in made["findings targets"]
    assert "0 of 6 requirements met; it fails against `sft_8`" in made["findings targets"]


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [(0.9, 0.3, "above (+0.60)"), (0.3, 0.9, "below (-0.60)"), (0.9, 0.9, "not told apart (0.00)")],
)
def test_the_brief_says_what_was_found(tmp_path, ours, theirs, word):
    for seed in range(1001, 1009):
        arms = {"rigid_reset": record(ours), "rigid_random": record(theirs), "auto_nll_100": record(0.9)}
        write(tmp_path, "retail_desk", seed, arms)
    brief = blocks(_summary(tmp_path))["brief"].replace(MINUS, "-")
    assert f"too large**, against a random reset of the same count: retail desk {word}." in brief
    assert "automatic alpha**" not in brief  # nothing to compare with
    assert "entropy gradient" not in brief


def test_the_brief_of_the_second_family(tmp_path):
    for task in ("retail_desk", "running_total"):
        for seed in range(1001, 1014):
            noise = 0.01 * (seed % 3)
            write(tmp_path, task, seed, {"rigid_entropy": record(0.9 - noise), "rigid_random": record(0.4)})
    brief = blocks(_summary(tmp_path))["brief"]
    assert "tested on the seeds from 1008 on, both tasks pooled: the entropy gradient's neurons" in brief
    assert "alpha too large: above (+0.49, n = 12)." in brief


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
    """One command: summary, figures and page, from a study whose second task has hardly begun."""
    arms = {"base", "sft_8", "sft_64", "fusion_30", "auto_nll_100", "auto_reset", "rigid", "rigid_reset"}
    study(
        tmp_path,
        seeds=range(1001, 1005),
        keep=lambda task, seed, arm: arm in arms and (task == "retail_desk" or seed == 1001),
    )
    (tmp_path / "docs" / "images").mkdir()
    text = PAGE.read_text()
    (tmp_path / "docs" / "evidence.md").write_text(PLACE.sub(r"<!-- study: \1 --><!-- end -->", text))
    main(tmp_path)
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "Retail desk: 4 seeds, 8 arms, 32 runs of RL" in capsys.readouterr().out
    assert page == filled(text, json.loads((tmp_path / "docs/results/study/summary.json").read_text()))
    assert not re.search(r"<!-- study: (main|checks).*?--><!-- end -->", page)
    pictures = list((tmp_path / "docs" / "images").iterdir())
    assert {picture.name for picture in pictures} == set(re.findall(r"images/(study-[\w-]+\.png)", text))
    assert all(picture.stat().st_size < 300_000 for picture in pictures)


def test_command_without_results(tmp_path):
    with pytest.raises(SystemExit, match="found none"):
        main(tmp_path)


def test_page_shows_the_summary():
    assert PAGE.read_text() == filled(PAGE.read_text(), json.loads(SUMMARY.read_text())), (
        "docs/evidence.md and docs/results/study/summary.json differ: run `python -m studies.analysis`."
    )


@pytest.mark.slow
def test_summary_is_that_of_the_raw_results():
    made = json.loads(json.dumps(summarise(load(SUMMARY.parent))))
    _assert_close(made, json.loads(SUMMARY.read_text()))


def _assert_close(made, kept, where=""):
    """Equal but for the last digits, which may differ from machine to machine."""
    if isinstance(made, dict):
        assert made.keys() == kept.keys(), where
        for key in made:
            _assert_close(made[key], kept[key], f"{where}/{key}")
    elif isinstance(made, list):
        assert len(made) == len(kept), where
        for number, pair in enumerate(zip(made, kept, strict=True)):
            _assert_close(*pair, f"{where}/{number}")
    elif isinstance(made, float):
        assert made == pytest.approx(kept, abs=2e-5), where
    else:
        assert made == kept, where
