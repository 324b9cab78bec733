from __future__ import annotations

import re
import subprocess
import sys

import pytest

from studies.analysis.__main__ import main
from studies.analysis.markdown import DASH, NONE
from studies.analysis.results import SECOND_EDITION, load, unfinished
from studies.analysis.second import second_blocks
from studies.analysis.second_brief import RECOMPUTE
from studies.analysis.second_values import NOT_YET
from studies.arms import EDITION_2_SEEDS
from tests.studies.analysis.made_up import (
    SETTINGS,
    VERSION,
    known,
    rows,
    run,
    second,
    study,
    whole_second,
    write,
)

TASKS = ("retail_desk", "running_total", "price_desk")
BLOCKS = {
    "second brief",
    "second confirmatory",
    "second defaults",
    "second frontier",
    "second pairs",
    "second recompute",
    "second refit",
    "second embeddings",
    "second facts",
    "second reset and refit",
    "second rungs",
    *(f"second remedies {task}" for task in TASKS),
    "second state",
    "second successes",
    "second summary statistics",
    "second targeted",
}


def results(root):
    return load(root / "docs" / "results" / "second", SECOND_EDITION)


def tables(block):
    """The tables of a block, in order."""
    return [rows(part) for part in block.split("\n\n") if part.startswith("|")]


def test_without_runs_every_block_says_so(tmp_path):
    made = second_blocks(results(tmp_path))
    assert made.keys() == BLOCKS
    for name in BLOCKS - {
        "second recompute",
        "second pairs",
        "second summary statistics",
        "second defaults",
        "second refit",
        "second embeddings",
    }:
        assert NOT_YET in made[name] or "no arm has been run yet" in made[name]
    assert not re.search(r"\d\.\d\d", made["second brief"])
    assert made["second defaults"].count("nothing follows yet") == 3


def test_a_price_list_of_each_seed_is_no_other_setting(tmp_path):
    second(tmp_path, {"price_desk": {"base": [0.1, 0.2, 0.3]}})
    task = results(tmp_path)["price_desk"]
    assert list(task.seeds) == [3001, 3002, 3003]
    assert task.arms == ["base"]
    assert unfinished(task)["base"] == (3, 20)
    assert unfinished(task)["fusion_70_reset"] == (0, 20)
    write(
        tmp_path,
        "price_desk",
        3004,
        {"base": run(0.1)},
        edition="second",
        settings={**SETTINGS, "task": "PriceDesk(seed=3001)"},
    )
    with pytest.raises(ValueError, match="same settings but seed 3004"):
        results(tmp_path)


@pytest.mark.parametrize(("task", "arm"), [("price_desk", "rigid_reset"), ("retail_desk", "tuning_omega_50")])
def test_refuses_arms_of_the_first_edition(tmp_path, task, arm):
    second(tmp_path, {task: {arm: [0.1]}})
    with pytest.raises(ValueError, match=arm):
        results(tmp_path)


def test_every_number_of_the_brief(tmp_path):
    second(
        tmp_path,
        {
            "price_desk": {
                "sft_64": [0.3, 0.5],
                "sft_8": [0.5, 0.7],
                "fusion_70_reset": [0.6, 0.8],
                "fusion_40": [0.49, 0.31],
            },
            "retail_desk": {"sft_8": [0.9], "long_rl": [0.99]},
        },
    )
    made = second_blocks(results(tmp_path))["second brief"]
    assert (
        f"Retail desk: seeds 3001 (n = 1); Running total: not run yet; Price desk: seeds 3001{DASH}3002 (n = 2)"
        in made
    )
    (table,) = tables(made)
    assert len(table) == 7
    excessive, moderate, long, refit, default, targeted, _ = table.values()
    desk = [f"Price desk: {name}" for name in ("ID (OOD)", "successes", "prices known after RL")]
    assert [excessive[column] for column in desk] == ["0.40 (0.30)", "1/2", "0.20"]  # half of each end
    assert [moderate[column] for column in desk] == ["0.60 (0.50)", "2/2", "0.30"]
    assert [targeted[column] for column in desk] == ["0.70 (0.60)", "2/2", "0.35"]
    assert [default[column] for column in desk] == ["0.40 (0.30)", "0/2", "0.20"]
    assert [refit[column] for column in desk] == [NOT_YET, NONE, NONE]
    assert long["Retail desk: ID (OOD)"] == "0.99 (0.89)"
    assert {row["Running total: ID (OOD)"] for row in table.values()} == {NOT_YET}


def test_the_snippet_recomputes_the_successes(tmp_path):
    """With the standard library alone, and from the raw file."""
    whole_second(tmp_path, seeds=5)
    found = subprocess.run(
        [sys.executable, "-I", "-c", RECOMPUTE], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    counts = dict(line.split(": ") for line in found.splitlines())
    tasks = results(tmp_path)
    made = second_blocks(tasks)
    assert made["second recompute"] == f"```python\n{RECOMPUTE}```"
    (table,) = tables(made["second brief"])
    arms = ["sft_64", "sft_8", "long_rl", "refit_40", "fusion_40", "fusion_70_reset", "fusion_40_embeddings"]
    assert [row["Price desk: successes"] for row in table.values()] == [counts[arm] for arm in arms]
    assert len(RECOMPUTE.splitlines()) <= 12


def test_state_tells_what_is_missing_and_what_it_ran_on(tmp_path):
    whole_second(tmp_path, seeds=2)
    write(
        tmp_path,
        "retail_desk",
        3003,
        {"sft_64": run(0.5)},
        edition="second",
        settings={**SETTINGS, "task": "Desk()"},
        version={**VERSION, "cpu": "Abacus 9"},
    )
    made = second_blocks(results(tmp_path))["second state"]
    lines = [line.split(" | ") for line in made.splitlines() if line.startswith("| ")]
    core = lines[2]
    assert core[:5] == ["| Retail desk", "core", "15", f"3001{DASH}3002 (2)", "31/300"]
    frontier = next(line for line in lines if line[1] == "frontier")
    assert frontier[0] == "| Price desk"
    assert frontier[3:] == [f"3001{DASH}3002 (2)", "36/360", "all of them |"]
    assert len(lines) == 1 + 1 + 2 + 2 + 3
    assert made.endswith("on Abacus 9 and a processor that was not noted.")
    runs = 2 * (15 + 26 + 15 + 26 + 15 + 18 + 26) + 1
    assert f"The {runs} runs were made with lightning_rejuv 0.1.0, torch 2.13.0" in made


def test_a_finished_edition_lacks_nothing(tmp_path):
    whole_second(tmp_path)
    tasks = results(tmp_path)
    assert all(unfinished(task) == {} for task in tasks.values())
    made = second_blocks(tasks)
    text = "\n".join(block for name, block in made.items() if name != "second recompute")
    for word in (NOT_YET, "unfinished,", "Not run yet", "nothing follows yet"):
        assert word not in text
    assert made["second state"].count("| none |") == 7
    for block in made.values():
        tables(block)  # no row differs in length


def test_command_writes_tables_and_the_picture(tmp_path, capsys):
    study(tmp_path, seeds=range(1001, 1004), keep=lambda task, seed, arm: arm in ("base", "sft_64"))
    whole_second(tmp_path, seeds=2)
    (tmp_path / "docs" / "images").mkdir()
    page, other = tmp_path / "docs" / "second.md", tmp_path / "docs" / "other.md"
    page.write_text("".join(f"<!-- study: {name} --><!-- end -->\n\n" for name in sorted(BLOCKS)))
    other.write_text("no places")
    main(tmp_path)
    once = page.read_text()
    assert other.read_text() == "no places"
    assert "--><!-- end -->" not in once
    assert not re.search(r"\|<!-- end -->", once)  # a table ends with its line
    assert (tmp_path / "docs" / "images" / "study-second.png").stat().st_size > 20_000
    assert "second: Price desk: 2 seeds, 59 arms, 118 runs of RL" in capsys.readouterr().out


def test_seeds_of_the_plan():
    planned = SECOND_EDITION.planned("price_desk")
    assert len(planned) == 59
    assert all(seeds == set(EDITION_2_SEEDS) for seeds in planned.values())
    assert known(0.1, 0.2)["end"]["unasked"]["right"] == 0.2
