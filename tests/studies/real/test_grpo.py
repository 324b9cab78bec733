"""The gradient of a step against a brute-force loss, and what a step does to the weights."""

from __future__ import annotations

import copy

import pytest
import torch

from examples.sft_to_rl.grpo import group_advantages, grpo_loss
from studies.real.grpo import GRPO, ProblemStream
from studies.real.recipes import RL
from studies.real.tasks import is_worked
from studies.real.training import fit
from tests.conftest import float64_llama
from tests.studies.real import made_up

PROMPTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
GROUPS = [
    [[12, 13, 14], [15], [12, 13, 16, 17]],
    [[18, 19], [18, 20], [18, 19]],  # rewards are equal
    [[21], [22, 12, 13], [14, 15]],
]
REWARDS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])


class Recorded(GRPO):
    """Keeps the gradient instead of taking the step; no Trainer is needed."""

    def manual_backward(self, loss):
        loss.backward()

    def update(self):
        self.grads = [parameter.grad for parameter in self.model.parameters()]
        return 1.0


def _brute_force(model, advantages, rl: RL):
    """GRPO's clipped surrogate at ratio one, token by token over padded single sequences."""
    total = sum(len(response) for group in GROUPS for response in group)
    losses = []
    for prompt, group, of_group in zip(PROMPTS, GROUPS, advantages, strict=True):
        for response, advantage in zip(group, of_group, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[:, len(prompt) - 1 : -1] / rl.temperature
            log_probs = logits.log_softmax(-1)
            picked = log_probs.gather(2, torch.tensor(response)[None, :, None])[..., 0]
            mask = torch.ones_like(picked, dtype=torch.bool)
            losses.append(grpo_loss(picked, picked.detach(), advantage[None].double(), mask, 0.2, total))
            losses.append(rl.entropy_bonus * (log_probs.exp() * log_probs).sum() / total)
    return torch.stack(losses).sum()


@pytest.mark.parametrize(
    "rl", [RL(), RL(temperature=1.5), RL(entropy_bonus=0.3), RL(temperature=0.7, entropy_bonus=0.3)]
)
def test_gradient_of_a_step(rl):
    model = float64_llama()
    module = Recorded(model, None, [], rl, torch.float64, 0)
    advantages = group_advantages(REWARDS)
    informative = REWARDS.amax(1) > REWARDS.amin(1)
    module.learn(PROMPTS, GROUPS, advantages, informative)
    found = [grad.clone() for grad in module.grads]
    model.zero_grad()
    _brute_force(model, advantages, rl).backward()
    for ours, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-7)


def test_without_an_informative_group_nothing_is_learned():
    module = Recorded(float64_llama(), None, [], RL(), torch.float64, 0)
    assert module.learn(PROMPTS, GROUPS, torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool)) == 0.0
    assert not hasattr(module, "grads")


def test_problems_come_in_order_and_whole_batches():
    stream = ProblemStream(list("abcdefg"), 3)
    assert list(stream) == [["a", "b", "c"], ["d", "e", "f"]]
    assert len(stream) == 2


@pytest.fixture
def rewarded(monkeypatch):
    """A reward that a random model gets now and then, and can learn."""
    from studies.real import grpo

    monkeypatch.setattr(grpo, "reward", lambda problem, response: float("e" in response))


def _module(dtype=torch.float32, steps: int = 12, **changes) -> GRPO:
    rl = RL("sum2", steps, 4, 8, learning_rate=2e-2, max_new_tokens=8, **changes)
    problems = made_up.SPLITS["sum2"].draw(rl.steps * rl.prompts, 5)
    return GRPO(made_up.llama(), made_up.tokenizer(), problems, rl, dtype, 3)


@pytest.mark.usefixtures("rewarded")
def test_what_is_rewarded_is_learned():
    curves = fit(_module(), 1, "cpu")
    assert {len(curve) for curve in curves.values()} == {12}
    assert sum(curves["reward"][:3]) / 3 < 0.5 < 0.8 < sum(curves["reward"][-3:]) / 3


@pytest.mark.usefixtures("rewarded")
def test_a_run_repeats():
    weights, curves = [], []
    for _ in range(2):
        module = _module(steps=2)
        curves.append(fit(module, 1, "cpu"))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.master.parameters()]))
    assert curves[0] == curves[1]
    assert torch.equal(*weights)


@pytest.mark.usefixtures("rewarded")
def test_in_bfloat16_the_master_weights_stay_in_float32_and_are_followed():
    module = _module(torch.bfloat16, steps=3)
    before = copy.deepcopy(module.master)
    curves = fit(module, 1, "cpu")
    assert max(curves["grad_norm"]) > 0
    pairs = list(zip(module.model.parameters(), module.master.parameters(), before.parameters(), strict=True))
    for computes, master, old in pairs:
        assert computes.dtype == torch.bfloat16
        assert master.dtype == torch.float32
        assert torch.equal(computes, master.to(torch.bfloat16))
        assert not torch.equal(master, old)
    assert any(not torch.equal(master, master.to(torch.bfloat16).float()) for _, master, _ in pairs)


def test_a_worked_answer_is_told_by_its_steps():
    assert is_worked("1+2=3\nAnswer: 3<|im_end|>")
    assert not is_worked("Answer: 3<|im_end|>")
