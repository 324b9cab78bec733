from __future__ import annotations

import pytest

from examples.sft_to_rl.model import build_model
from examples.sft_to_rl.seeds import generator
from studies.arms import EPOCHS, MODERATE_EPOCHS
from studies.sizes import LARGER, sizes

TASKS = list(MODERATE_EPOCHS)
WITH_LARGE = list(LARGER)


@pytest.mark.parametrize("name", TASKS)
def test_the_reported_budget(name):
    task, settings = sizes(name)
    assert settings.rl_budget == 5120
    assert (settings.id_evaluation, settings.ood_evaluation) == ((128, 8), (128, 4))
    assert settings.recipe_of(task) == task.recipe


@pytest.mark.parametrize("name", WITH_LARGE)
def test_the_large_problems_are_longer_and_fit_the_model(name):
    small, large = (sizes(name, model)[0] for model in ("small", "large"))
    draws = [task.demonstrations(generator(901, "demonstrations"), 32) for task in (small, large)]
    lengths = [batch["input_ids"].shape[1] for batch in draws]
    assert lengths[1] > 1.3 * lengths[0]
    for split in ("id", "ood"):
        environment = large.environment(large.problems(generator(901, "problems"), 8, split))
        assert environment.prompts.shape[1] + environment.max_new_tokens <= 128


@pytest.mark.parametrize("name", WITH_LARGE)
def test_demonstrations_of_the_large_problems_earn_the_reward(name):
    """Replay demonstrated responses of problems whose claims are right, token by token."""
    task, _ = sizes(name, "large")
    batch = task.demonstrations(generator(901, "demonstrations"), 64)
    problems = task.problems(generator(901, "demonstrations"), 64)
    if name == "retail_desk":
        problems.claims = problems.values = batch_values(batch, task.requests)
        problems.keys, problems.changes = batch_requests(batch, task.requests)
    environment = task.environment(problems)
    width = environment.prompts.shape[1]
    tokens, labels = batch["input_ids"][:, width:], batch["labels"][:, width:]
    for t in range(tokens.shape[1]):
        got, is_agent = environment.step(tokens[:, t])
        assert bool((got == tokens[:, t]).all())
        assert bool((is_agent == (labels[:, t] != -100)).all())
    assert environment.outcome().rewards.tolist() == [1.0] * 64


def _columns(batch, requests, offset):
    # A demonstration is a begin token, and for every request its five tokens, three of a write, one reply.
    return batch["input_ids"][:, [1 + 9 * turn + offset for turn in range(requests)]]


def batch_values(batch, requests):
    from examples.sft_to_rl.tasks.retail_desk import DIGIT

    return _columns(batch, requests, 1) - DIGIT


def batch_requests(batch, requests):
    from examples.sft_to_rl.tasks.retail_desk import DIGIT, KEY, PLUS

    sign = 2 * (_columns(batch, requests, 2) == PLUS).long() - 1
    return _columns(batch, requests, 0) - KEY, sign * (_columns(batch, requests, 3) - DIGIT)


def test_the_large_model():
    task, settings = sizes("retail_desk", "large")
    model = build_model(len(task.vocabulary), 901, settings.shape)
    assert 25e6 < sum(p.numel() for p in model.parameters()) < 30e6
    assert len(model.model.layers) == 8


@pytest.mark.parametrize("model", ["small", "large"])
def test_the_miniature_keeps_problems_and_ladder(model):
    task, settings = sizes("retail_desk", model, miniature=True)
    assert task == sizes("retail_desk", model)[0]
    recipe = settings.recipe_of(task)
    assert (recipe.moderate_epochs, recipe.excessive_epochs) == (8, max(EPOCHS))
    assert recipe.demonstrations == 32


def test_the_price_desk_has_no_large_problems_and_each_seed_its_own_prices():
    with pytest.raises(ValueError, match="running_total.* with a large model but got 'price_desk'"):
        sizes("price_desk", "large")
    lists = [sizes("price_desk", seed=seed)[0].prices.tolist() for seed in (1, 1, 2)]
    assert lists[0] == lists[1] != lists[2]
