from __future__ import annotations

import copy
import json
import struct

import pytest

from examples.sft_to_rl.arms import ARMS
from examples.sft_to_rl.report import write_report
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.summary import differences, findings, headline, summarise, table

ENDS = {  # arm: (ID start, ID end, OOD start, OOD end) of seed 1; seed 2 is 0.02 above
    "base": (0.0, 0.0, 0.0, 0.0),
    "modsft": (0.1, 0.8, 0.1, 0.7),
    "oversft": (0.3, 0.32, 0.2, 0.2),
    "rejuvenated": (0.1, 0.9, 0.05, 0.8),
}


def scores(value):
    return {
        "pass_at_1": value,
        "pass_at_k": min(1.0, 2 * value),
        "greedy": value,
        "form_rate": value / 2,
        "style_rate": 0.0,
        "token_entropy": 0.3,
    }


def result(task, seed, ends=ENDS):
    arms = {}
    for arm, values in ends.items():
        id_start, id_end, ood_start, ood_end = (value + 0.02 * (seed - 1) for value in values)
        arms[arm] = {
            "id": {"start": scores(id_start), "end": scores(id_end)},
            "ood": {"start": scores(ood_start), "end": scores(ood_end)},
            "curves": {"reward": [id_start, (id_start + id_end) / 2, id_end]},
            "seconds": 4.0 + seed,
        }
    arms["rejuvenated"]["rejuvenation"] = {
        "alpha": 0.4,
        "neurons_reset": 31,
        "relative_drift": 0.04,
        "token_entropy": 0.35,
    }
    history = {"epoch": [0.0, 8.0, 64.0], "value": [0.3, 0.2, 0.02]}
    return {
        "task": task,
        "seed": seed,
        "arms": arms,
        "sft": {"moderate_epochs": 8, "token_entropy": history, "relative_drift": history},
        "seconds": {"pretraining": 30.0, "sft": 6.0, "total": 60.0},
    }


@pytest.fixture
def results():
    """As workers finish: tasks in order, seeds not."""
    return [result("retail_desk", 2), result("retail_desk", 1), result("running_total", 1)]


def test_means_with_every_seed_beside_them(results):
    summary = summarise(results, Settings(), seconds=100.0)
    assert summary["task"] == "retail_desk"
    assert summary["seeds"] == 2
    assert summary["rl_budget"] == 5120
    assert list(summary["arms"]) == ["base", "modsft", "oversft", "rejuvenated"]
    ours = summary["arms"]["rejuvenated"]
    assert ours["id"] == {"start": pytest.approx(0.11), "end": pytest.approx(0.91)}
    assert ours["ood"] == {"start": pytest.approx(0.06), "end": pytest.approx(0.81)}
    assert ours["successes"] == 2
    assert summary["arms"]["oversft"]["successes"] == 0
    assert [seed["seed"] for seed in ours["per_seed"]] == [1, 2]
    assert [seed["id"]["end"]["pass_at_1"] for seed in ours["per_seed"]] == [0.9, 0.92]
    assert ours["seconds"] == pytest.approx(5.5)
    assert summary["tasks"]["retail_desk"]["arms"] == summary["arms"]
    assert summary["tasks"]["running_total"]["seeds"] == 1
    assert differences(summary, "id") == pytest.approx([0.58, 0.58])
    assert json.loads(json.dumps(summary)) == summary


def test_words_follow_the_numbers(results):
    summary = summarise(results[:2], Settings(), seconds=100.0)
    assert headline(summary) == (
        "After excessive SFT, RL stays at 33%. Rejuvenated first, the same checkpoint reaches 91%."
    )
    first, second, third = findings(summary)
    assert "stays where it started" in first
    assert "0.31 -> 0.33" in first
    assert "0 of 2 seeds reach 0.5" in first
    assert "starts lower (0.11) and ends at 0.91 (0.81 out of distribution), +0.58 (+0.60)" in second
    assert "2 of 2 seeds" in second
    assert "stopping SFT in time also works" in third
    assert "5,120" in third

    reversed_ends = {**ENDS, "oversft": (0.3, 0.9, 0.2, 0.9), "rejuvenated": (0.4, 0.4, 0.3, 0.3)}
    reversed_ends["modsft"] = (0.1, 0.2, 0.1, 0.2)
    opposite = summarise([result("retail_desk", seed, reversed_ends) for seed in (1, 2)], Settings(), 1.0)
    assert headline(opposite) == "After the same RL, excessive SFT ends at 91%, rejuvenated at 41%."
    first, second, third = findings(opposite)
    assert "improves" in first
    assert "2 of 2 seeds reach 0.5" in first
    assert "starts no lower" in second
    assert "-0.50 (-0.60)" in second
    assert "ahead on both in 0 of 2 seeds" in second
    assert "stopping SFT in time at this epoch does not work either" in third


def test_one_bad_seed_takes_the_claim_out_of_the_headline():
    good, bad = result("retail_desk", 1), result("retail_desk", 2)
    bad["arms"]["rejuvenated"]["id"]["end"]["pass_at_1"] = 0.4
    assert "stays at" not in headline(summarise([good, bad], Settings(), 1.0))


def test_table(results):
    lines = table("retail_desk", summarise(results, Settings(), 100.0)["tasks"]["retail_desk"]).splitlines()
    assert "seeds 1, 2" in lines[0]
    assert "5,120 responses" in lines[0]
    (row,) = [line for line in lines if line.startswith("excessive SFT, rejuvenated")]
    assert row.split()[3:] == ["0.11", "0.91", "+0.80", "0.06", "0.81", "+0.75", "2/2", "6", "0.90", "0.92"]
    assert "alpha 0.40, 0.40; neurons reset 31, 31" in lines[-1]


@pytest.mark.parametrize("tasks", [1, 2])
def test_files(results, tasks, tmp_path, capsys):
    results = results[:2] if tasks == 1 else [*results, result("running_total", 2)]
    untouched = copy.deepcopy(results)
    summary = write_report(results, tmp_path, miniature=False, seconds=100.0)
    assert results == untouched
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    picture = (tmp_path / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1600, 900)
    printed = capsys.readouterr().out
    assert all(about.title in printed for about in ARMS.values())
    assert printed.count("Rejuvenated, it starts lower") == tasks
