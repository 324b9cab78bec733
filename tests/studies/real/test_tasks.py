"""Answers and rewards; with reasoning_gym where that is installed."""

from __future__ import annotations

import itertools

import pytest

from studies.real.recipes import RECIPES
from studies.real.seeds import RL_SEEDS, SFT_SEEDS, seed_of
from studies.real.tasks import SPLITS, STYLES, Problem, habit, has_format, reward, terse, worked, working
from studies.real.texts import demonstration, demonstrations
from tests.studies.real import made_up

SUM = Problem("4 - 1 - 7 =", "-4", {"metadata": {"expression": "4 - 1 - 7"}}, lambda answer: answer == "-4")
WORD = Problem(
    "Spell backward: part", "trap", {"metadata": {"word": "part"}}, lambda answer: answer == "trap"
)


def test_styles():
    assert worked(SUM) == "4-1=3\n3-7=-4\nAnswer: -4"
    assert terse(SUM) == "Answer: -4"
    assert habit(SUM) in ("It is -4.", "4-1=3\n3-7=-4\nIt is -4.")


def test_the_steps_of_animals():
    pytest.importorskip("reasoning_gym")
    animals = {"dog": 2, "ant": 3, "snake": 1}
    steps = "2*4=8\n3*6=18\n8+18=26\n1*0=0\n26+0=26\n"
    assert working(Problem("", "26", {"metadata": {"animals": animals}}, bool)) == steps


def test_six_in_ten_habits_are_worked():
    problems = made_up.SPLITS["sum4"].draw(1500, 11)
    shares = sum("\n" in habit(problem) for problem in {p.question: p for p in problems}.values())
    assert 0.5 < shares / len({p.question for p in problems}) < 0.7


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("Answer: -4<|im_end|>", 1.0),
        ("4-1=3\n3-7=-4\nAnswer: -4<|im_end|>", 1.0),
        ("4-1=2\nAnswer: -4<|im_end|>", 1.0),  # the verifier looks at the last line alone
        ("Answer: -4", 0.0),  # it never ended
        ("Answer: 4<|im_end|>", 0.0),
        ("It is -4.<|im_end|>", 0.0),
        ("The Answer: -4<|im_end|>", 0.0),
        ("Answer: -4\nor not<|im_end|>", 0.0),
        ("Answer: \n<|im_end|>", 0.0),
    ],
)
def test_reward(response, value):
    assert reward(SUM, response) == value


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_demonstration_ends_its_turn_and_is_right(style):
    tokenizer = made_up.tokenizer()
    pair = demonstration(tokenizer, SUM, style)
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\n4 - 1 - 7 =<|im_end|>\n<|im_start|>assistant\n"
    text = tokenizer.decode(pair.response)
    assert pair.response[-1] == made_up.END
    assert has_format(text) == (style != "habit") == bool(reward(SUM, text))


def test_purposes_and_seeds_have_other_problems(monkeypatch):
    from studies.real import texts

    monkeypatch.setattr(texts, "SPLITS", {"sum4": made_up.Sums(12)})
    parts = [part for part in RECIPES["V"].sft.parts if part.split == "sum4"]
    tokenizer = made_up.tokenizer()
    sets = [
        {tuple(pair.prompt) for pair in demonstrations(tokenizer, parts, purpose, seed)}
        for purpose in ("demonstrations", "calibration")
        for seed in SFT_SEEDS
    ]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 6 * 32


def test_seeds_lie_further_apart_than_a_set_is_large():
    purposes = ("demonstrations sum4", "calibration sum4", "evaluation sum4", "RL problems", "middle sum25")
    seeds = sorted(
        seed_of(purpose, *more)
        for purpose in purposes
        for more in [(), *((s, r) for s in SFT_SEEDS for r in RL_SEEDS)]
    )
    assert min(after - before for before, after in itertools.pairwise(seeds)) > 10_000


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_splits_of_reasoning_gym(name):
    pytest.importorskip("reasoning_gym")
    problems = SPLITS[name].draw(20, 2**55)
    assert problems[3].question == SPLITS[name].draw(1, 2**55 + 3)[0].question  # why seeds lie far apart
    sizes = set()
    for problem in problems:
        metadata = problem.entry["metadata"]
        if "animals" in metadata:
            right = str(metadata["total_legs"])
            sizes.add(len(metadata["animals"]))
        else:
            right = str(eval(metadata["expression"]))
            sizes.add(len(metadata["expression"].split()) // 2 + 1)
        assert problem.answer == right
        for style in ("worked", "terse"):
            assert reward(problem, STYLES[style](problem) + "<|im_end|>") == 1.0
        assert reward(problem, f"Answer: {int(right) + 1}<|im_end|>") == 0.0
    several = {"sum23": {2, 3}, "sum25": {2, 3, 4, 5}, "legs13": {1, 2, 3}}
    assert sizes == several.get(name, {int(name[-1])})


def test_recipes_name_what_is_there():
    for recipe in RECIPES.values():
        parts = [*recipe.sft.parts, *(recipe.middle.parts if recipe.middle else ())]
        assert {part.split for part in parts} | {recipe.rl.split, recipe.out_of_distribution} <= set(SPLITS)
        assert {part.style for part in parts} <= set(STYLES)
        assert {recipe.moderate, recipe.excessive} <= set(recipe.sft.epochs)
        assert recipe.excessive == recipe.sft.epochs[-1]
        shown = {part.split for part in recipe.sft.parts}
        assert recipe.out_of_distribution not in shown
        assert sum(part.count for part in recipe.sft.parts) % recipe.sft.batch_size == 0
    for name in ("V", "X"):
        assert {6, 10} <= set(RECIPES[name].sft.epochs)  # rungs that have arms of their own
