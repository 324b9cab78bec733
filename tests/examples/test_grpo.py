from __future__ import annotations

import copy
import math

import lightning as L
import pytest
import torch

from examples.sft_to_rl.grpo import CLIP, GRPO, LR, ProblemStream, group_advantages, grpo_loss
from examples.sft_to_rl.model import build_model
from examples.sft_to_rl.sampling import sample
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import TASKS, get_task
from examples.sft_to_rl.training import Curves
from tests.examples.conftest import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*IterableDataset.*__len__.*")


def plain_loss_and_gradient(new, old, advantages, mask, clip, denominator):
    """The definition, token by token, and its derivative by hand: a clipped token has none."""
    loss, gradient = 0.0, [[0.0] * len(row) for row in new]
    for i, advantage in enumerate(advantages):
        for t in range(len(new[i])):
            if not mask[i][t]:
                continue
            ratio = math.exp(new[i][t] - old[i][t])
            free, clipped = ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage
            loss -= min(free, clipped) / denominator
            if free <= clipped:
                gradient[i][t] = -ratio * advantage / denominator
    return loss, gradient


def test_loss_and_gradient_against_the_definition():
    draws = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(12, 7, generator=draws, dtype=torch.float64)
    new = (old + 0.4 * torch.randn(12, 7, generator=draws, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(12, generator=draws, dtype=torch.float64)
    mask = torch.rand(12, 7, generator=draws) < 0.7
    loss = grpo_loss(new, old, advantages, mask, clip=0.2, denominator=61.0)
    loss.backward()
    plain, gradient = plain_loss_and_gradient(
        new.tolist(), old.tolist(), advantages.tolist(), mask.tolist(), 0.2, 61.0
    )
    ratio = (new - old).exp()[mask]
    assert bool((ratio > 1.2).any() & (ratio < 0.8).any())  # both clips are at work
    assert float(loss.detach()) == pytest.approx(plain, abs=1e-12)
    torch.testing.assert_close(new.grad, torch.tensor(gradient, dtype=torch.float64))


def test_tokens_of_the_environment_have_no_influence_even_when_they_are_absurd():
    new = torch.zeros(1, 3).requires_grad_()
    old = torch.tensor([[0.0, -500.0, 0.0]])  # a ratio of e^500 would overflow
    mask = torch.tensor([[True, False, True]])
    loss = grpo_loss(new, old, torch.tensor([2.0]), mask, clip=0.2, denominator=2.0)
    loss.backward()
    assert float(loss.detach()) == -2.0
    assert new.grad.tolist() == [[-1.0, 0.0, -1.0]]


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    advantages = group_advantages(rewards)
    std = math.sqrt(0.25 * 0.75)  # of the population
    wanted = [0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3
    assert advantages[0].tolist() == pytest.approx(wanted)
    assert advantages[1].tolist() == [0.0] * 4
    assert advantages[2].tolist() == pytest.approx([-0.9998, 0.9998, 0.9998, -0.9998], abs=1e-5)


SETTINGS = Settings(rl_steps=2, prompts=4, group=4)


@pytest.fixture
def rewarding(monkeypatch):
    """Rewards that differ within half of the groups, whatever an untrained model writes."""

    def rewarded(*arguments, **options):
        rollouts = sample(*arguments, **options)
        rewards = torch.zeros(4, 4)
        rewards[0, 0] = rewards[2, 1] = rewards[2, 2] = 1.0
        rewards[3] = 1.0
        rollouts.rewards = rewards.flatten()
        return rollouts

    monkeypatch.setattr("examples.sft_to_rl.grpo.sample", rewarded)
    return rewarded


class Recorder(L.Callback):
    """Keeps the problems, the step's outputs and the weights after it."""

    def __init__(self):
        self.problems, self.outputs, self.weights = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.problems.append(batch)
        self.outputs.append(outputs)
        self.weights.append(copy.deepcopy(pl_module.model.state_dict()))


def test_one_step_against_plain_code(rewarding, half_trained):
    """A step of the module equals GRPO written out over *all* groups, silent ones included."""
    task = get_task("retail_desk")
    model = half_trained(task.name)
    reference = copy.deepcopy(model)
    module, recorder, curves = GRPO(model, task, SETTINGS, seed=901), Recorder(), Curves()
    quiet_trainer(logger=curves, callbacks=[recorder]).fit(module)

    fresh = GRPO(reference, task, SETTINGS, seed=901)  # for its streams
    problems = next(iter(ProblemStream(task, SETTINGS, 901)))
    rollouts = rewarding(reference, task.environment(problems.repeat(4)), fresh.sampler)
    rewards = rollouts.rewards.view(4, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (
        rewards.std(1, correction=0, keepdim=True) + 1e-4
    )
    assert int((~rollouts.agent_mask & (rollouts.tokens != 0)).sum()) > 20  # the environment spoke
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    sequences, length = rollouts.sequences(), rollouts.prompts.shape[1]
    order = torch.randperm(4, generator=fresh.shuffler).tolist()
    norms = []
    before = torch.cat([p.detach().flatten() for p in reference.parameters()])
    for chosen in (order[:2], order[2:]):
        rows = [prompt * 4 + i for prompt in chosen for i in range(4)]
        logits = reference(sequences[rows]).logits[:, length - 1 : -1]
        new = logits.log_softmax(-1).gather(2, rollouts.tokens[rows][..., None])[..., 0]
        ratio = (new - rollouts.log_probs[rows]).exp()
        gain = advantages.flatten()[rows][:, None]
        mask = rollouts.agent_mask[rows]
        loss = -(torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)[mask]).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)))
        if gain.abs().sum() > 0:
            optimizer.step()
    after = torch.cat([p.detach().flatten() for p in reference.parameters()])
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(recorder.weights[0][name], weight, atol=2e-5, rtol=0)

    assert torch.equal(recorder.outputs[0]["rewards"], rewards)
    logged = {name: values[0] for name, values in curves.values.items()}
    assert logged["rl/reward"] == pytest.approx(7 / 16)
    assert logged["rl/pass_at_k"] == pytest.approx(3 / 4)
    assert logged["rl/zero_variance_groups"] == pytest.approx(1 / 2)
    assert logged["rl/entropy"] == pytest.approx(rollouts.token_entropy, rel=1e-5)
    assert logged["rl/grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    assert logged["rl/update_norm"] == pytest.approx(float((after - before).norm()), rel=1e-2)
    assert len(curves.values["rl/reward"]) == 2


def test_groups_without_variance_change_nothing(monkeypatch):
    """An untrained model earns nothing: its weights come out bit for bit."""
    task = get_task("retail_desk")
    model = build_model(len(task.vocabulary), seed=901)
    before = copy.deepcopy(model.state_dict())
    curves = Curves()
    quiet_trainer(logger=curves).fit(GRPO(model, task, SETTINGS, seed=901))
    assert curves.values["rl/reward"] == [0.0, 0.0]
    assert curves.values["rl/zero_variance_groups"] == [1.0, 1.0]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_arms_meet_the_same_problems_and_the_same_sampler(name):
    task = get_task(name)
    recorders = [Recorder(), Recorder()]
    modules = [GRPO(build_model(len(task.vocabulary), i), task, SETTINGS, 901) for i in range(2)]
    assert torch.equal(modules[0].sampler.get_state(), modules[1].sampler.get_state())
    # What only the rejuvenated arm does must not shift anything.
    modules[1].sample_responses(modules[1].model)
    list(modules[1].calibration_dataloader())
    assert torch.equal(modules[0].sampler.get_state(), modules[1].sampler.get_state())
    for module, recorder in zip(modules, recorders, strict=True):
        quiet_trainer(callbacks=[recorder]).fit(module)
    for first, second in zip(*(recorder.problems for recorder in recorders), strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
        )
    first, second = recorders[0].problems
    assert not torch.equal(next(iter(vars(first).values())), next(iter(vars(second).values())))


def test_calibration_and_responses_are_batches_with_labels_on_the_agents_tokens():
    task = get_task("retail_desk")
    settings = Settings(held_out=40, responses=12)
    module = GRPO(build_model(len(task.vocabulary), 901), task, settings, 901)
    batches = list(module.calibration_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) == 40
    state = torch.get_rng_state()
    (responses,) = module.sample_responses(module.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(responses["input_ids"]) == 12
    for batch in [*batches, responses]:
        assert batch["input_ids"].shape == batch["labels"].shape
        assert bool((batch["labels"][:, :6] == -100).all())  # the first request is the user's
        assert bool((batch["labels"] != -100).any(dim=1).all())
    (again,) = module.sample_responses(module.model)
    assert torch.equal(responses["input_ids"], again["input_ids"])


def test_problems_stay_on_the_cpu_where_the_environments_run():
    module = GRPO(None, get_task("retail_desk"), SETTINGS, 901)
    problems = module.task.problems(torch.Generator().manual_seed(0), 4)
    assert module.transfer_batch_to_device(problems, torch.device("meta"), 0) is problems
