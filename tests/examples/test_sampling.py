from __future__ import annotations

import pytest
import torch

from examples.sft_to_rl.evaluate import evaluate
from examples.sft_to_rl.grpo import response_log_probs
from examples.sft_to_rl.model import load_model, save_model
from examples.sft_to_rl.sampling import sample
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks import TASKS, get_task
from examples.sft_to_rl.tasks.base import Outcome


@pytest.fixture(params=list(TASKS))
def task(request):
    return get_task(request.param)


@pytest.fixture
def model(task, half_trained):
    return half_trained(task.name)


def roll(task, model, seed=901, count=64, **options):
    problems = task.problems(generator(seed, "problems"), count)
    return sample(model, task.environment(problems), generator(seed, "samples"), **options)


def test_cached_log_probs_and_entropies_equal_a_full_forward(task, model):
    rollouts = roll(task, model)
    with torch.no_grad():
        logits = model(rollouts.sequences()[:, :-1]).logits[:, rollouts.prompts.shape[1] - 1 :].double()
        full = torch.log(torch.softmax(logits, -1))
    mask = rollouts.agent_mask
    wanted = full.gather(2, rollouts.tokens[..., None])[..., 0]
    torch.testing.assert_close(rollouts.log_probs[mask].double(), wanted[mask], atol=2e-5, rtol=0)
    entropy = -(full.exp() * full).sum(-1)
    torch.testing.assert_close(rollouts.entropies[mask].double(), entropy[mask], atol=2e-5, rtol=0)
    assert float(rollouts.log_probs[~mask].abs().sum()) == 0
    assert float(rollouts.entropies[~mask].abs().sum()) == 0
    assert rollouts.token_entropy == pytest.approx(float(entropy[mask].mean()), abs=1e-5)
    teacher_forced = response_log_probs(model, rollouts.sequences(), rollouts.prompts.shape[1])
    torch.testing.assert_close(teacher_forced[mask], rollouts.log_probs[mask], atol=2e-5, rtol=0)


def test_injected_tokens_are_seen_by_the_model_and_are_not_the_agents(model, task):
    rollouts = roll(task, model, count=256)
    batch = rollouts.batch()
    assert torch.equal(
        batch["labels"] != -100, torch.cat([rollouts.prompts != rollouts.prompts, rollouts.agent_mask], 1)
    )
    if task.name == "retail_desk":
        injected = ~rollouts.agent_mask & (rollouts.tokens != 0)
        assert int(injected.sum()) > 1000
        assert not torch.isin(rollouts.tokens[injected], torch.tensor(task.vocabulary.encode("?!.#@&"))).any()


def test_greedy_takes_the_most_likely_token(task, model):
    rollouts = roll(task, model, greedy=True)
    with torch.no_grad():
        logits = model(rollouts.sequences()[:, :-1]).logits[:, rollouts.prompts.shape[1] - 1 :]
    mask = rollouts.agent_mask
    assert torch.equal(logits.argmax(-1)[mask], rollouts.tokens[mask])


def test_samples_follow_the_model(task, model):
    """First tokens of 2,000 samples of one prompt against its distribution, by chi-square."""
    problems = task.problems(generator(901, "one"), 1).repeat(2000)
    rollouts = sample(model, OneToken(task.environment(problems)), generator(901, "samples"))
    with torch.no_grad():
        wanted = 2000 * model(rollouts.prompts[:1]).logits[0, -1].softmax(-1)
    counts = torch.bincount(rollouts.tokens[:, 0], minlength=len(wanted))
    large = wanted > 5
    chi_square = float(((counts - wanted)[large] ** 2 / wanted[large]).sum())
    degrees = int(large.sum()) - 1
    assert degrees >= 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


class OneToken:
    """Ends every episode after one token."""

    max_new_tokens = 1

    def __init__(self, environment):
        self.prompts, self.done = environment.prompts, environment.done

    def step(self, proposed):
        self.done = torch.ones_like(self.done)
        return proposed, torch.ones_like(self.done)

    def outcome(self):
        zeros = torch.zeros(len(self.done))
        return Outcome(zeros, zeros, zeros, zeros)


def test_same_seed_same_rollouts_and_the_global_generator_is_left_alone(task, model):
    state = torch.get_rng_state()
    first, second, other = roll(task, model), roll(task, model), roll(task, model, seed=902)
    assert torch.equal(first.sequences(), second.sequences())
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_model_is_the_same_model(task, model, tmp_path):
    loaded = load_model(save_model(model, tmp_path / "model"))
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="Expected a Hugging Face checkpoint in"):
        load_model(tmp_path)


class Scripted:
    """A task whose environment rewards by a fixed pattern: what evaluation makes of it is known."""

    def __init__(self, task, rewards):
        self.task, self.rewards = task, rewards

    def problems(self, generator, count, split):
        return self.task.problems(generator, count, split)

    def environment(self, problems):
        environment = OneToken(self.task.environment(problems))
        repeats = len(problems) // len(self.rewards)
        rewards = self.rewards.flatten() if repeats > 1 else self.rewards[:, 0]
        environment.outcome = lambda: Outcome(rewards, 1 - rewards, 0.5 * torch.ones_like(rewards), rewards)
        return environment


def test_evaluation_against_a_known_pattern_of_rewards(task, model):
    rewards = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]])
    scores = evaluate(model, Scripted(task, rewards), "id", prompts=4, samples=3, seed=901)
    assert scores["pass_at_1"] == pytest.approx(6 / 12)
    assert scores["pass_at_k"] == pytest.approx(3 / 4)
    assert scores["greedy"] == pytest.approx(2 / 4)
    assert scores["form_rate"] == pytest.approx(6 / 12)
    assert scores["style_rate"] == pytest.approx(0.5)
    again = evaluate(model, Scripted(task, rewards), "id", prompts=4, samples=3, seed=901)
    assert again == scores
    assert evaluate(model, task, "ood", 4, 2, 901).keys() == scores.keys()
