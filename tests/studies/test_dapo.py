from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch

from examples.sft_to_rl.grpo import GRPO, ProblemStream
from examples.sft_to_rl.model import build_model
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import get_task
from studies.dapo import DAPO, concatenate_rollouts
from tests.studies.rewarded import reinforce, rewarded

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = Settings(rl_steps=3, prompts=4, group=4)  # 12 prompts, 48 responses
TASK = get_task("running_total")


@pytest.fixture
def updates(monkeypatch):
    """What GRPO's own update is given, step by step."""
    given, update = [], GRPO.update

    def noting(module, rollouts, rewards):
        given.append((rollouts, rewards))
        return update(module, rollouts, rewards)

    monkeypatch.setattr(GRPO, "update", noting)
    return given


def policy():
    return build_model(len(TASK.vocabulary), 901)


def test_a_step_lasts_until_it_has_its_groups_and_the_run_until_its_budget_is_used_up(updates, monkeypatch):
    signals = [
        1,
        0,
        0,
        1,
        0,
        1,
        1,
        0,
        0,
        1,
        0,
        0,
    ]  # of 12 prompts: 4, 2 and 1 for the first step, then 4 and 1
    sampled = rewarded(monkeypatch, signals, 4)
    module = DAPO(policy(), TASK, SETTINGS, 901)
    trainer = reinforce(module)
    assert [len(rollouts.rewards) // 4 for rollouts in sampled] == [4, 2, 1, 4, 1]
    assert module.responses == 48 == SETTINGS.rl_budget
    # The second step is made from the only group that it has when the budget ends: one minibatch.
    assert [rewards.shape for _, rewards in updates] == [(4, 4), (1, 4)]
    assert trainer.global_step == 3
    assert all(bool((rewards.amax(1) > rewards.amin(1)).all()) for _, rewards in updates)

    # The groups are those with a signal, whole and in the order in which they were sampled.
    rows = [r.tokens[i : i + 4].tolist() for r in sampled for i in range(0, len(r.rewards), 4)]
    wanted = [without_padding(row) for group, has in zip(rows, signals, strict=True) if has for row in group]
    got = [without_padding(row) for rollouts, _ in updates for row in rollouts.tokens.tolist()]
    assert got == wanted


def without_padding(row):
    return [token for token in row if token]


def test_a_run_without_any_signal_makes_no_update(updates, monkeypatch):
    sampled = rewarded(monkeypatch, [0] * 12, 4)
    model = policy()
    module = DAPO(copy.deepcopy(model), TASK, SETTINGS, 901)
    trainer = reinforce(module)
    assert [len(rollouts.rewards) for rollouts in sampled] == [16, 16, 16]
    assert updates == []
    assert (trainer.global_step, module.responses) == (0, 48)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), module.model.parameters(), strict=True))


def test_it_is_grpo_where_every_group_has_a_signal(monkeypatch):
    trained = []
    for kind in (GRPO, DAPO):
        with monkeypatch.context() as patched:
            rewarded(patched, [1] * 12, 4)
            module = kind(policy(), TASK, SETTINGS, 901)
            trained.append((reinforce(module).global_step, module.responses, module.model))
    assert trained[0][:2] == trained[1][:2] == (6, 48)
    pairs = zip(trained[0][2].parameters(), trained[1][2].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(policy().parameters()), next(trained[0][2].parameters()))


def test_prompts_are_those_of_the_other_arms_in_their_order(monkeypatch):
    rewarded(monkeypatch, [1, 0, 0] * 4, 4)
    drawn, environment = [], type(TASK).environment

    def noting(task, problems):
        drawn.append(problems)
        return environment(task, problems)

    monkeypatch.setattr(type(TASK), "environment", noting)
    reinforce(DAPO(policy(), TASK, SETTINGS, 901))
    wanted = list(ProblemStream(TASK, SETTINGS, 901))
    for field in fields(wanted[0]):
        ours, theirs = (
            torch.cat([getattr(problems, field.name) for problems in batches]) for batches in (drawn, wanted)
        )
        assert torch.equal(ours, theirs.repeat_interleave(4, dim=0))


def test_an_update_does_not_know_of_groups_that_were_left_out(monkeypatch):
    """Its loss is divided by the agent tokens of the kept groups, unlike GRPO's."""
    rollouts = rewarded(monkeypatch, [1, 0, 1, 0], 4)
    module = DAPO(policy(), TASK, SETTINGS, 901)
    stream = iter(ProblemStream(TASK, SETTINGS, 901))
    GRPO.collect(module, next(stream))
    (sampled,) = rollouts
    losses = []
    monkeypatch.setattr(module, "optimizers", lambda: torch.optim.SGD(module.model.parameters(), lr=0.0))
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    found, _ = module.update(sampled, sampled.rewards.view(4, 4))
    for first in (0, 8):  # one group a minibatch, in either order; the ratio is 1
        rewards, mask = sampled.rewards[first : first + 4], sampled.agent_mask[first : first + 4]
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
        losses.append(-float((advantages[:, None] * mask).sum() / mask.sum()))
    assert sorted(found) == pytest.approx(sorted(losses), abs=1e-5)


def test_episodes_of_several_lengths_are_put_together(monkeypatch):
    sampled = rewarded(monkeypatch, [1] * 3, 4)
    module = DAPO(policy(), TASK, SETTINGS, 901)
    problems = next(iter(ProblemStream(TASK, SETTINGS, 901)))
    narrow = type(problems)(**{f.name: getattr(problems, f.name)[:1] for f in fields(problems)})
    for _ in range(3):
        GRPO.collect(module, narrow)
    short, long = sampled[0], sampled[1]
    short.tokens, short.agent_mask = short.tokens[:, :3], short.agent_mask[:, :3]
    short.log_probs, short.entropies = short.log_probs[:, :3], short.entropies[:, :3]
    both = concatenate_rollouts([short, long])
    assert both.tokens.shape == both.agent_mask.shape == (8, long.tokens.shape[1])
    assert torch.equal(both.tokens[:4, :3], short.tokens)
    assert not bool(both.agent_mask[:4, 3:].any())
    assert both.agent_mask.dtype == torch.bool
    assert torch.equal(both.sequences()[4:], long.sequences())
    assert both.token_entropy == pytest.approx(
        float(
            (short.entropies.sum() + long.entropies.sum()) / (short.agent_mask.sum() + long.agent_mask.sum())
        )
    )
