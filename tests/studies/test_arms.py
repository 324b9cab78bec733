from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys

import pytest

from lightning_rejuv.config import Options
from studies.arms import (
    ARMS,
    BARGAIN,
    EDITION_2_SEEDS,
    EPOCHS,
    EXCESSIVE,
    FIRST_SEEDS,
    MODERATE_EPOCHS,
    REPORTED_SEEDS,
    RIGID_ALPHA,
    RULE_SEEDS,
    SECOND_SEEDS,
    TUNING_SEEDS,
)
from studies.former_rules import JOINT, TARGETS
from studies.passes import FIRST_TASKS, GROUPS, ON_REQUEST, passes
from studies.remedies import REMEDIES, make_rl
from studies.seed import take_reset
from studies.sizes import sizes

TASKS = list(MODERATE_EPOCHS)
NOT_OF_REJUVENATE = {"start", "support_of", "remedy", "refit_steps", "sft"}


def test_importing_the_table_does_not_import_torch():
    code = "import sys, studies.arms; sys.exit('torch' in sys.modules or 'lightning_rejuv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", TASKS)
def test_the_table_fits_the_examples_recipes(name):
    recipe = sizes(name)[0].recipe
    assert recipe.moderate_epochs == MODERATE_EPOCHS[name]
    assert f"sft_{recipe.excessive_epochs}" == EXCESSIVE
    assert {recipe.moderate_epochs, recipe.excessive_epochs} <= set(EPOCHS)
    assert set(RIGID_ALPHA) == set(TASKS)


@pytest.mark.parametrize("name", FIRST_TASKS)
def test_every_arm_but_tuning_is_planned_for_a_whole_set_of_seeds_and_for_each_once(name):
    planned = passes(name)
    assert {arm for p in planned for arm in p.arms} == {
        a for a in ARMS if ARMS[a].group not in ("tuning", "rule", "second", "frontier")
    }
    assert planned[0].arms[:3] == ("base", f"sft_{MODERATE_EPOCHS[name]}", "sft_64")
    assert {a for a in planned[0].arms if ARMS[a].group == "remedy"} == {
        "entropy_bonus",
        "kl_to_base",
        "hot",
        "long_rl",
    }
    for seeds in (FIRST_SEEDS, SECOND_SEEDS):
        arms = [arm for p in planned if p.seeds == seeds for arm in p.arms]
        assert len(arms) == len(set(arms))
    assert {p.seeds for p in planned if p.arms} == {FIRST_SEEDS, SECOND_SEEDS}


@pytest.mark.parametrize("name", FIRST_TASKS)
def test_whatever_is_compared_runs_on_the_same_seeds(name):
    """The other side of every control and variant of the second seeds is there too."""
    second = {arm for p in passes(name) if p.seeds == SECOND_SEEDS for arm in p.arms}
    for arm in second:
        other = ARMS[arm].support_of
        assert other is None or other in second
    assert {
        "sft_64",
        "auto_nll_100",
        "rigid",
        "rigid_entropy",
        "rigid_reset",
        "rigid_paper",
        "fusion_50",
    } <= second


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_recipe_is_one_that_the_library_and_the_ladder_take(arm, name):
    recipe = ARMS[arm].recipe(name)
    assert recipe["start"] in ("base", *(f"sft_{n}" for n in EPOCHS))
    options = {key: value for key, value in recipe.items() if key not in NOT_OF_REJUVENATE}
    if options:
        if isinstance(options["alpha"], str):
            assert options["alpha"] in {*TARGETS, BARGAIN, JOINT}
            assert options.pop("alpha_target", 1.0) > 0
            options["alpha"] = "auto"
        reset = take_reset(options)
        checked = Options(**options, reset=reset)  # raises for what it does not know
        assert (checked.reset.fraction if checked.reset else 0.0) == ARMS[arm].reset_fraction
    if "remedy" in recipe:
        assert recipe["remedy"] in REMEDIES
        task, _ = sizes(name)
        with pytest.raises(ValueError, match="Expected `remedy`"):
            make_rl("no_" + recipe["remedy"], None, task, None, 0, None)


@pytest.mark.parametrize(("name", "twin"), [("retail_desk", "fusion_80"), ("running_total", "fusion_70")])
def test_the_rigid_fusion_is_the_only_arm_that_is_there_twice(name, twin):
    pairs = [
        pair
        for pair in itertools.combinations(
            [a for a in ARMS if ARMS[a].group not in ("tuning", "frontier")], 2
        )
        if ARMS[pair[0]].recipe(name) == ARMS[pair[1]].recipe(name)
    ]
    assert pairs == [(twin, "rigid")]


@pytest.mark.parametrize("name", FIRST_TASKS)
def test_rules_for_alpha_are_run_only_if_asked_for_and_on_seeds_of_their_own(name):
    (run,) = [p for p in passes(name, ["rule"]) if p.arms]
    assert run == ("rule", RULE_SEEDS, ("sft_64", "bargain", "bargain_reset", "fusion_40"))
    assert not set(RULE_SEEDS) & {*REPORTED_SEEDS, *TUNING_SEEDS}


@pytest.mark.parametrize("name", [*FIRST_TASKS, "price_desk"])
def test_the_second_edition_is_run_only_if_asked_for_and_has_every_arm_of_its_own(name):
    assert not [p for p in passes(name) if p.arms and p.name in ON_REQUEST]
    runs = [p for p in passes(name, ["core", "frontier", "remedies"]) if p.arms]
    assert {p.seeds for p in runs} == {EDITION_2_SEEDS}
    planned = [arm for p in runs for arm in p.arms]
    assert len(planned) == len(set(planned)) == {"price_desk": 41 + 18}.get(name, 41)
    own = {arm for arm in ARMS if ARMS[arm].group == "second"}
    first_edition = (
        "sft_64 base auto_nll_100 auto_reset_entropy fusion_40 bargain entropy_bonus kl_to_base hot long_rl"
    )
    of_all = {*own, *first_edition.split(), f"sft_{MODERATE_EPOCHS[name]}"}
    frontier = {arm for arm in ARMS if ARMS[arm].group == "frontier"}
    assert of_all <= set(planned)
    assert (
        frontier <= set(planned)
        if name == "price_desk"
        else set(planned) == {*of_all, "fusion_70_reset", "fusion_40_embeddings"}
    )
    others = {*REPORTED_SEEDS, *TUNING_SEEDS, *RULE_SEEDS}
    assert len(set(EDITION_2_SEEDS) - others) == 20


def test_the_first_edition_had_no_third_task():
    for name in set(TASKS) - set(FIRST_TASKS):
        assert not [p for p in passes(name) if p.arms]


def test_lengths_are_compared_with_the_same_arms_on_seeds_of_their_own():
    runs = {name: [p for p in passes(name, ["length"]) if p.arms] for name in TASKS}
    assert {name for name, of_task in runs.items() if of_task} == {
        "retail_desk",
        "noted_desk_32",
        "noted_desk_112",
    }
    (arms,) = {of_task[0].arms for of_task in runs.values() if of_task}
    assert {"sft_64", "joint", "fusion_40", "sft_8"} <= set(arms)
    assert not set(runs["retail_desk"][0].seeds) & {
        *EDITION_2_SEEDS,
        *REPORTED_SEEDS,
        *TUNING_SEEDS,
        *RULE_SEEDS,
    }


def test_an_arm_of_two_editions_is_run_on_the_seeds_of_the_first_unless_the_second_is_named():
    chosen = [p for p in passes("retail_desk", arms=["sft_64", "refit_40"]) if p.arms]
    assert [(p.name, p.arms) for p in chosen] == [
        ("main", ("sft_64",)),
        ("confirmation", ("sft_64",)),
        ("core", ("refit_40",)),
    ]
    fusions = [p.name for p in passes("retail_desk", groups=["fusion"]) if p.arms]
    assert fusions == ["main", "controls", "sweeps"]


# Digest of the recipes of the first edition's arms, on both tasks: its recorded results were made by them.
FIRST_EDITION = "0da02c021aa36278"


def test_the_recipes_of_recorded_results_stay_as_they_are():
    recipes = {
        task: {arm: ARMS[arm].recipe(task) for arm in ARMS if ARMS[arm].group not in ("second", "frontier")}
        for task in ("retail_desk", "running_total")
    }
    text = json.dumps(recipes, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == FIRST_EDITION


def test_a_recipe_names_the_moderate_checkpoint_of_its_task():
    starts = {task: ARMS["fusion_40_of_moderate"].recipe(task)["start"] for task in TASKS}
    assert starts == {task: f"sft_{sizes(task)[0].recipe.moderate_epochs}" for task in TASKS}
    assert ARMS["fusion_40_of_moderate"].recipe("retail_desk") == {
        "start": "sft_8",
        "alpha": 0.4,
        "reset_fraction": 0.0,
    }


def test_random_controls_differ_from_their_arms_in_the_ranking_alone():
    pairs = {
        "fusion_50_random": "fusion_50_reset",
        "rigid_random": "rigid_reset",
        "rigid_paper_random": "rigid_paper",
        "rigid_entropy_random": "rigid_entropy",
        "auto_reset_random": "auto_reset_entropy",
    }
    for control, arm in pairs.items():
        wanted = {**ARMS[arm].recipe("retail_desk"), "rank_by": "random"}
        assert ARMS[control].recipe("retail_desk") == wanted


def test_seeds_that_were_tuned_on_are_never_reported():
    seen = {*range(1, 6), *range(101, 200), *range(301, 309), *range(401, 409), *TUNING_SEEDS}
    assert not seen & set(REPORTED_SEEDS)
    assert len(set(FIRST_SEEDS)) == len(set(SECOND_SEEDS)) == 20
    assert len(set(REPORTED_SEEDS)) == 40


def test_a_variant_differs_from_its_arm_in_one_option():
    ours = ARMS["rigid_entropy"].recipe("retail_desk")
    for name, arm in ARMS.items():
        made = arm.recipe("retail_desk")
        if name.startswith("rigid_entropy_") and "support_of" not in made:
            differing = {key for key in made.keys() | ours.keys() if made.get(key) != ours.get(key)}
            assert len(differing) == 1, name


def test_selection_keeps_the_order_of_the_passes():
    everything = passes("retail_desk")
    assert [p.name for p in everything] == [
        "main",
        "confirmation",
        "controls",
        "sweeps",
        "variants",
        "rule",
        "core",
        "frontier",
        "remedies",
        "length",
        "tuning",
    ]
    chosen = passes("retail_desk", groups=["fusion"], arms=["rigid", "tuning_omega_50"])
    assert chosen[0] == ("main", FIRST_SEEDS, ("fusion_30", "fusion_50", "rigid"))
    fusions = tuple(f"fusion_{percent}" for percent in (40, 20, 60, 70, 80, 10, 90))
    assert chosen[3] == ("sweeps", SECOND_SEEDS, ("rigid", *fusions))
    assert chosen[-1] == ("tuning", TUNING_SEEDS, ("tuning_omega_50",))
    for group in GROUPS:
        assert any(p.arms for name in TASKS for p in passes(name, groups=[group])), group
