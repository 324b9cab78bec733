from __future__ import annotations

import pytest

from studies.analysis.checks import DEFAULT
from studies.analysis.markdown import DASH, MINUS
from studies.analysis.page import blocks
from studies.analysis.results import load
from studies.analysis.summary import summarise
from tests.studies.analysis.made_up import record, rows, study, write

TASKS = ("retail_desk", "running_total")


def _blocks(root):
    return blocks(summarise(load(root / "docs" / "results" / "study")))


def _lines(block):
    return [line.replace(MINUS, "-").replace(DASH, "-").removeprefix("- ") for line in block.splitlines()]


def test_the_state_of_a_finished_study(tmp_path):
    """What is run beyond the plan, or planned for other seeds, does not make a study unfinished."""
    study(
        tmp_path, seeds=[1001], tasks=["retail_desk"], keep=lambda task, seed, arm: arm in ("base", "rigid")
    )
    summary = summarise(load(tmp_path / "docs" / "results" / "study"))
    assert blocks(summary)["state"].startswith("**The study is not finished**")
    summary["tasks"]["retail_desk"]["unfinished"] = {}
    assert blocks(summary)["state"] == "Every planned arm was run in every seed planned for it."


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
    made = _blocks(tmp_path)
    assert rows(made["checks auto_reset"])["base (`base`)"]["Retail desk, ID"].endswith("**fail**")
    assert made["findings targets"].endswith("automatic alpha: **no**, 0/4 with `auto_nll_100`.")
    assert "0 of 6 comparisons passed; it fails against `sft_8`" in made["findings targets"]


def test_the_default_is_judged_first_and_on_fresh_seeds_by_itself(tmp_path):
    """On the first set it wins, on the second it loses to moderate SFT and one of three seeds fails."""
    for seed, end in ((1001, 0.95), (1002, 0.97), (1003, 0.96), (1021, 0.8), (1022, 0.82), (1023, 0.3)):
        arms = {
            DEFAULT: record(end),
            "auto_nll_100": record(0.9),
            "auto_reset": record(0.1),
            "sft_8": record(0.7),
        }
        write(tmp_path, "retail_desk", seed, arms)
    made = _blocks(tmp_path)
    everything, fresh, alone, target_logit, successes = _lines(made["findings targets"])
    assert f"(`{DEFAULT}`) ends at 0.80 ± 0.27 ID" in everything
    assert everything.endswith("(retail desk, n = 6): 2 of 2 comparisons passed.")
    assert "seeds 1021-1040 alone, which ran after it had become the default, ends at 0.64 ±" in fresh
    assert "(retail desk, n = 3): 0 of 2 comparisons passed; it fails against `sft_8`" in fresh
    assert ("(`auto_nll_100`)" in alone, "(`auto_reset`)" in target_logit) == (True, True)
    assert "**no**, 5/6 with `auto_reset_entropy` and 6/6 with `auto_nll_100`; on seeds" in successes
    assert successes.endswith("alone 2/3 with `auto_reset_entropy` and 3/3 with `auto_nll_100`.")
    cells = {
        name: rows(made[f"checks {name}"])["moderate SFT (`sft_8`) (at least as good)"]["Retail desk, ID"]
        for name in (DEFAULT, "fresh")
    }
    assert (cells[DEFAULT].endswith(" of 6) pass"), cells["fresh"].endswith(" of 3) **fail**")) == (
        True,
        True,
    )
    (requirements,) = [
        line for line in _lines(made["brief"]) if line.startswith("**What was to be reached**")
    ]
    order = [
        "the default meets 2 of 2",
        "the default on seeds 1021-1040 alone meets 0 of 2",
        "alpha alone meets",
    ]
    assert [requirements.index(words) for words in order] == sorted(requirements.index(w) for w in order)


def test_every_seed_succeeds(tmp_path):
    for seed in (1001, 1021):
        write(tmp_path, "retail_desk", seed, {DEFAULT: record(0.5), "auto_reset": record(0.1)})
    assert (
        "automatic alpha: **yes**, 2/2 with `auto_reset_entropy`; on seeds"
        in (_blocks(tmp_path)["findings targets"])
    )


def test_rejuvenated_is_the_default_in_the_brief(tmp_path):
    arms = {DEFAULT: 0.9, "auto_reset": 0.8, "sft_64": 0.3, "long_rl": 0.6, "hot": 0.7}
    write(tmp_path, "retail_desk", 1001, {arm: record(end) for arm, end in arms.items()})
    first = _blocks(tmp_path)["brief"].splitlines()[0]
    assert "ends at 0.30 (0/1 seeds succeed), rejuvenated first at 0.90 (1/1 seeds succeed)" in first
    assert "0.70 (1/1 seeds succeed) from the best remedy within RL (temperature 1.5)" in first


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [(0.9, 0.3, "above (+0.60)"), (0.3, 0.9, "below (-0.60)"), (0.9, 0.9, "not told apart (0.00)")],
)
def test_the_brief_says_what_was_found(tmp_path, ours, theirs, word):
    for seed in range(1001, 1009):
        arms = {"rigid_reset": record(ours), "rigid_random": record(theirs), "auto_nll_100": record(0.9)}
        write(tmp_path, "retail_desk", seed, arms)
    brief = _blocks(tmp_path)["brief"].replace(MINUS, "-")
    assert f"too large**, against a random reset of the same count: retail desk {word}." in brief
    assert "automatic alpha**" not in brief  # nothing to compare with
    assert "entropy gradient" not in brief


def test_the_brief_keeps_the_families_apart(tmp_path):
    """The second family's seeds show a difference, the third's show none; earlier seeds count for neither."""
    for task in TASKS:
        for seed in (*range(1001, 1014), *range(1021, 1027)):
            noise = 0.01 * (seed % 3)
            ours = 0.1 if seed < 1008 else 0.9 if seed < 1021 else 0.4
            arms = {
                "rigid_entropy": record(ours - noise),
                "rigid_random": record(0.4),
                "rigid_entropy_random": record(0.41 - noise if seed % 2 else 0.39 - noise),
            }
            write(tmp_path, task, seed, arms)
    made = _blocks(tmp_path)
    third, second = [line for line in _lines(made["brief"]) if "both tasks pooled" in line]
    assert third.startswith("**Neurons by entropy gradient**, the default, tested on seeds that ran after")
    assert "(1021-1040), both tasks pooled: the entropy gradient's neurons against random ones, as" in third
    assert third.endswith("alpha too large: not told apart (0.00, n = 12).")
    assert "tested on seeds 1008-1020, both tasks pooled: the entropy gradient's neurons" in second
    assert second.endswith("alpha too large: above (+0.49, n = 12).")
    assert "`rigid_entropy_random`" in made["third"]
    assert "`rigid_entropy_random`" not in made["second"]
    assert "1 of a second family, 1 of a third" in made["counts"]


def test_measures_that_some_starts_lack_are_named(tmp_path):
    """The base's entropy is known in one seed of two."""
    for seed in (1001, 1021):
        arms = {"rigid": record(0.9), "sft_64": record(0.1, support=-9.0), "rigid_reset": record(0.2)}
        write(tmp_path, "retail_desk", seed, {**arms, **({"base": record(0.0)} if seed == 1001 else {})})
    said = _blocks(tmp_path)["findings forecast"].splitlines()
    assert len(said) == 2
    assert all(line.endswith(" Fewer starts have `token_entropy_ratio`.") for line in said)
