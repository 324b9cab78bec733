"""The verdict against what became of the starts: each kind of raw results, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

from studies.analysis.forecast import Start
from studies.verdicts import confusion, confusion_table, main, of_notes, of_real, of_start
from tests.studies.analysis.made_up import record, rows, write

PAGE = Path(__file__).parents[2] / "docs" / "evidence-appendix.md"


def start(form_rate=1.0, task="running_total", success=True, **measures):
    return Start(task, 1, "arm", measures, 0.9, success, form_rate)


def test_a_start_is_judged_by_its_rollouts_and_by_what_guessing_gives():
    few = {"pass_at_1": 0.06, "pass_at_8": 0.3, "zero_variance_groups": 0.8}
    assert (
        of_start(start(0.5, **few)).level == "at risk"
    )  # half of the responses have the form, 1 in 10 is right
    assert of_start(start(0.3, **few)).level == "healthy"
    assert of_start(start(0.5, "retail_desk", **few)).level == "healthy"
    kept = {"token_entropy": 0.3, "token_entropy_ratio": 0.95}
    assert of_start(start(0.5, **few, **kept)).level == "healthy"


def test_without_its_rollouts_entropy_alone_is_left():
    measures = {"pass_at_1": 0.0, "pass_at_8": 0.0, "zero_variance_groups": 1.0, "token_entropy": 0.3}
    assert of_start(start(**measures)).level == "cannot start"
    for ratio, level in ((0.02, "over-confident"), (0.2, "at risk"), (0.9, "unknown")):
        assert of_start(start(**measures, token_entropy_ratio=ratio), rollouts=False).level == level
    assert of_start(start(**measures), rollouts=False).level == "unknown"


def scores(one, eight, zero):
    return {"id": {"pass_at_1": one, "pass_at_k": eight, "zero_variance": zero}}


def test_starts_on_a_real_model_count_once_for_each_rl_seed(tmp_path):
    content = {
        "recipe": "V",
        "sft_seed": 101,
        "settings": {"evaluation": [48, 8]},
        "starts": {"moderate": scores(0.26, 0.75, 0.25), "excessive": scores(0.12, 0.13, 0.97)},
        "arms": {
            "moderate": {"201": scores(0.6, 1, 0), "202": scores(0.24, 1, 0)},
            "excessive": {"201": scores(0.25, 1, 0)},
            "longer": {"201": scores(0.9, 1, 0)},  # another RL from a start that is there already
        },
    }
    (tmp_path / "V").mkdir()
    (tmp_path / "V" / "seed_101.json").write_text(json.dumps(content))
    found = of_real(tmp_path)
    assert [(one.name, one.level, one.succeeded) for one in found] == [
        ("V 101 moderate 201", "healthy", True),
        ("V 101 moderate 202", "healthy", False),
        ("V 101 excessive 201", "over-confident", True),
    ]
    assert {level: counts for level, counts in confusion(found).items() if any(counts)} == {
        "healthy": [1, 1],
        "over-confident": [1, 0],
    }


def test_the_notes_are_judged_right_and_shown_in_the_page():
    found = of_notes()
    assert all((start.level == "healthy") is start.succeeded for start in found)
    assert confusion_table({"SmolLM2-135M": confusion(found)}) in PAGE.read_text()


def test_it_prints_a_table_for_each_set_of_results(tmp_path, capsys):
    write(tmp_path, "retail_desk", 1001, {"base": record(0.0), "sft_8": record(0.9)})
    study, real = tmp_path / "docs" / "results" / "study", tmp_path / "real"
    main(study, [real])
    printed = capsys.readouterr().out
    assert "Retail desk\n\n| verdict before RL |" in printed
    assert "On a real model" not in printed
    (real / "X").mkdir(parents=True)
    settings = {"evaluation": [48, 8]}
    content = {"recipe": "X", "sft_seed": 1, "settings": settings, "starts": {"base": scores(0.2, 0.7, 0.3)}}
    (real / "X" / "seed_1.json").write_text(
        json.dumps({**content, "arms": {"base": {"2": scores(0.1, 0.2, 0.8)}}})
    )
    main(study, [real])
    printed = capsys.readouterr().out
    table = printed[printed.index("On a real model") :]
    assert rows("\n".join(line for line in table.splitlines() if line.startswith("|")))["healthy"] == {
        "verdict before RL": "healthy",
        "all: succeeded": "0",
        "all: failed": "1",
    }
    assert "X 1 base 2: healthy, RL failed" in printed
