from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from examples.sft_to_rl.tasks import get_task
from lightning_rejuv.options import Options
from studies.arms import (
    ARMS,
    EPOCHS,
    EXCESSIVE,
    GROUPS,
    MODERATE_EPOCHS,
    REPORTED_SEEDS,
    RIGID_ALPHA,
    TUNING_SEEDS,
    passes,
    selected,
)
from studies.remedies import make_rl

TASKS = list(MODERATE_EPOCHS)
NOT_OF_REJUVENATE = {"start", "support_of", "remedy"}


def test_importing_the_table_does_not_import_torch():
    code = "import sys, studies.arms; sys.exit('torch' in sys.modules or 'lightning_rejuv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", TASKS)
def test_the_table_fits_the_examples_recipes(name):
    recipe = get_task(name).recipe
    assert recipe.moderate_epochs == MODERATE_EPOCHS[name]
    assert f"sft_{recipe.excessive_epochs}" == EXCESSIVE
    assert {recipe.moderate_epochs, recipe.excessive_epochs} <= set(EPOCHS)
    assert set(RIGID_ALPHA) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_passes_hold_every_arm_but_tuning_once_and_begin_with_the_main_ones(name):
    ordered = [arm for arms in passes(name).values() for arm in arms]
    assert sorted(ordered) == sorted(arm for arm in ARMS if ARMS[arm].group != "tuning")
    assert ordered[:3] == ["base", f"sft_{MODERATE_EPOCHS[name]}", "sft_64"]
    assert {a for a in passes(name)["main"] if ARMS[a].group == "remedy"} == {
        "entropy_bonus",
        "kl_to_base",
        "hot",
        "long_rl",
    }


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_recipe_is_one_that_the_library_and_the_ladder_take(arm, name):
    recipe = ARMS[arm].recipe(name)
    assert recipe["start"] in ("base", *(f"sft_{n}" for n in EPOCHS))
    options = {key: value for key, value in recipe.items() if key not in NOT_OF_REJUVENATE}
    if options:
        checked = Options(**options)  # raises for what it does not know
        assert checked.reset_fraction == ARMS[arm].reset_fraction
    if "remedy" in recipe:
        task = get_task(name)
        with pytest.raises(ValueError, match="Expected `remedy`"):
            make_rl("no_" + recipe["remedy"], None, task, None, 0, None)


@pytest.mark.parametrize(("name", "twin"), [("retail_desk", "fusion_80"), ("running_total", "fusion_70")])
def test_the_rigid_fusion_is_the_only_arm_that_is_there_twice(name, twin):
    pairs = [
        pair
        for pair in itertools.combinations(ARMS, 2)
        if ARMS[pair[0]].recipe(name) == ARMS[pair[1]].recipe(name)
    ]
    assert pairs == [(twin, "rigid")]


def test_random_controls_differ_from_their_arms_in_the_ranking_alone():
    pairs = {
        "fusion_50_random": "fusion_50_reset",
        "rigid_random": "rigid_reset",
        "rigid_paper_random": "rigid_paper",
    }
    for control, arm in pairs.items():
        wanted = {**ARMS[arm].recipe("retail_desk"), "rank_by": "random"}
        assert ARMS[control].recipe("retail_desk") == wanted


def test_seeds_that_were_tuned_on_are_never_reported():
    seen = {*range(1, 6), *range(101, 200), *range(301, 309), *range(401, 409), *TUNING_SEEDS}
    assert not seen & set(REPORTED_SEEDS)
    assert len(set(REPORTED_SEEDS)) == 20


def test_selection_keeps_the_order_of_the_passes():
    everything = list(selected("retail_desk"))
    assert everything == list(passes("retail_desk").values())
    chosen = list(selected("retail_desk", groups=["fusion"], arms=["rigid", "tuning_omega_50"]))
    assert chosen[0] == ("fusion_30", "fusion_50", "rigid")
    assert chosen[-2] == tuple(f"fusion_{p}" for p in (10, 20, 40, 60, 70, 80, 90))
    assert chosen[-1] == ("tuning_omega_50",)
    assert all(any(selected("retail_desk", groups=[group])) for group in GROUPS)
