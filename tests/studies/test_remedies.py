from __future__ import annotations

import copy
import math

import pytest
import torch

from examples.sft_to_rl.grpo import GRPO, response_log_probs
from examples.sft_to_rl.model import build_model, save_model
from examples.sft_to_rl.sampling import sample
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import get_task
from studies.remedies import kl_estimate, make_rl

SETTINGS = Settings(rl_steps=3, prompts=4, group=4)
TASK = get_task("running_total")


@pytest.fixture
def base(tmp_path):
    return save_model(build_model(len(TASK.vocabulary), 902), tmp_path / "base")


def rolled(module):
    """Responses, advantages and the rows of informative groups; every second group has no signal."""
    environment = TASK.environment(TASK.problems(generator(901, "problems"), 4).repeat(4))
    rollouts = sample(module.model, environment, module.sampler, temperature=module.temperature)
    return rollouts, torch.linspace(-1, 1, 16), torch.tensor([True, False]).repeat_interleave(4).repeat(2)


def distributions(model, rollouts):
    """Log-probabilities after every token, float64, by a softmax of our own."""
    with torch.no_grad():
        logits = model(rollouts.sequences()[:, :-1]).logits[:, rollouts.prompts.shape[1] - 1 :].double()
    return torch.log(torch.softmax(logits, -1))


@pytest.mark.parametrize("remedy", ["entropy_bonus", "kl_to_base"])
def test_the_added_term_token_by_token(remedy, base):
    model = build_model(len(TASK.vocabulary), 901)
    module = make_rl(remedy, model, TASK, SETTINGS, 901, base)
    rollouts, advantages, informative = rolled(module)
    members = torch.arange(4, 16)  # without the first group
    arguments = (rollouts, advantages, informative, members)
    added = module.minibatch_loss(*arguments) - GRPO.minibatch_loss(module, *arguments)

    policy = distributions(model, rollouts)
    reference = distributions(build_model(len(TASK.vocabulary), 902), rollouts)
    terms = []
    for row in members.tolist():
        for t, token in enumerate(rollouts.tokens[row].tolist()):
            if not rollouts.agent_mask[row, t]:
                continue
            p, q = policy[row, t].tolist(), reference[row, t].tolist()
            if remedy == "entropy_bonus":
                terms.append(-0.05 * -sum(math.exp(x) * x for x in p))
            else:
                ratio = math.exp(q[token] - p[token])
                terms.append(0.1 * (ratio - math.log(ratio) - 1))
    assert not bool(rollouts.agent_mask[members].all())  # some episodes have ended
    assert float(added.detach()) == pytest.approx(sum(terms) / len(terms), abs=2e-6)


@pytest.mark.parametrize("remedy", ["entropy_bonus", "kl_to_base"])
def test_the_term_is_there_without_a_learning_signal(remedy, base):
    module = make_rl(remedy, build_model(len(TASK.vocabulary), 901), TASK, SETTINGS, 901, base)
    rollouts, advantages, _ = rolled(module)
    nothing = torch.zeros(16, dtype=torch.bool)
    assert GRPO.minibatch_loss(module, rollouts, advantages, nothing, torch.arange(8)) is None
    loss = module.minibatch_loss(rollouts, advantages, nothing, torch.arange(8))
    loss.backward()
    assert float(loss.detach()) != 0
    assert all(float(p.grad.abs().sum()) > 0 for p in module.model.parameters())


def test_the_estimate_is_unbiased_for_the_kl_from_policy_to_base():
    draws = torch.Generator().manual_seed(0)
    policy, base = (torch.randn(5, 9, generator=draws, dtype=torch.float64).log_softmax(-1) for _ in "pb")
    expected = (policy.exp() * kl_estimate(policy, base)).sum(-1)
    exact = torch.nn.functional.kl_div(base, policy, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(expected, exact)
    assert bool((kl_estimate(policy, base) >= 0).all())


def test_the_base_of_the_kl_is_neither_trained_nor_saved(base):
    model = build_model(len(TASK.vocabulary), 901)
    module = make_rl("kl_to_base", model, TASK, SETTINGS, 901, base)
    assert [id(p) for p in module.parameters()] == [id(p) for p in model.parameters()]
    assert all(name.startswith("model.") for name in module.state_dict())


def test_hot_samples_and_optimises_one_policy():
    model = build_model(len(TASK.vocabulary), 901)
    module = make_rl("hot", model, TASK, SETTINGS, 901, None)
    rollouts, advantages, informative = rolled(module)
    mask = rollouts.agent_mask
    with torch.no_grad():
        logits = model(rollouts.sequences()[:, :-1]).logits[:, rollouts.prompts.shape[1] - 1 :].double()
    wanted = torch.log(torch.softmax(logits / 1.5, -1)).gather(2, rollouts.tokens[..., None])[..., 0]
    torch.testing.assert_close(rollouts.log_probs[mask].double(), wanted[mask], atol=2e-5, rtol=0)
    now = response_log_probs(model, rollouts.sequences(), rollouts.prompts.shape[1], module.temperature)
    torch.testing.assert_close(now[mask], rollouts.log_probs[mask], atol=2e-5, rtol=0)
    # Before the first step the ratio is 1: the loss is the mean advantage over the agent's tokens.
    loss = module.minibatch_loss(rollouts, advantages, informative, torch.arange(16))
    by_hand = -(advantages[:, None] * mask * informative[:, None]).sum() / mask.sum()
    torch.testing.assert_close(loss.detach(), by_hand, atol=1e-4, rtol=0)


def test_long_rl_begins_with_the_problems_of_the_others():
    model = build_model(len(TASK.vocabulary), 901)
    plain, longer = (make_rl(r, copy.deepcopy(model), TASK, SETTINGS, 901, None) for r in (None, "long_rl"))
    assert longer.settings.rl_budget == 4 * plain.settings.rl_budget
    streams = [[b.operands.tolist() for b in module.train_dataloader()] for module in (plain, longer)]
    assert list(map(len, streams)) == [3, 12]
    assert streams[1][:3] == streams[0]
