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
from studies.remedies import REMEDIES, kl_estimate, make_rl
from tests.studies.rewarded import reinforce, rewarded

pytestmark = pytest.mark.filterwarnings("ignore")
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


WEIGHTS = {
    "entropy_bonus_01": 0.01,
    "entropy_bonus": 0.05,
    "entropy_bonus_20": 0.2,
    "kl_to_base_02": 0.02,
    "kl_to_base": 0.1,
    "kl_to_base_50": 0.5,
    "kl_to_sft_02": 0.02,
    "kl_to_sft_10": 0.1,
    "kl_to_sft_50": 0.5,
}


@pytest.mark.parametrize("remedy", WEIGHTS)
def test_the_added_term_token_by_token(remedy, base):
    """The policy (903) has moved from its start (901); the base (902) is a third model."""
    start = build_model(len(TASK.vocabulary), 901)
    model = copy.deepcopy(start)
    module = make_rl(remedy, model, TASK, SETTINGS, 901, base)
    model.load_state_dict(build_model(len(TASK.vocabulary), 903).state_dict())
    rollouts, advantages, informative = rolled(module)
    members = torch.arange(4, 16)  # without the first group
    arguments = (rollouts, advantages, informative, members)
    added = module.minibatch_loss(*arguments) - GRPO.minibatch_loss(module, *arguments)

    policy = distributions(model, rollouts)
    to_start = "sft" in remedy
    reference = distributions(start if to_start else build_model(len(TASK.vocabulary), 902), rollouts)
    weight = WEIGHTS[remedy]
    terms = []
    for row in members.tolist():
        for t, token in enumerate(rollouts.tokens[row].tolist()):
            if not rollouts.agent_mask[row, t]:
                continue
            p, q = policy[row, t].tolist(), reference[row, t].tolist()
            if "entropy" in remedy:
                terms.append(-weight * -sum(math.exp(x) * x for x in p))
            else:
                ratio = math.exp(q[token] - p[token])
                terms.append(weight * (ratio - math.log(ratio) - 1))
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


@pytest.mark.parametrize("remedy", ["kl_to_base", "kl_to_sft_10"])
def test_the_reference_of_the_kl_is_neither_trained_nor_saved(remedy, base):
    model = build_model(len(TASK.vocabulary), 901)
    module = make_rl(remedy, model, TASK, SETTINGS, 901, base)
    assert [id(p) for p in module.parameters()] == [id(p) for p in model.parameters()]
    assert all(name.startswith("model.") for name in module.state_dict())


@pytest.mark.parametrize(("remedy", "temperature"), [("hot", 1.5), ("hot_2", 2.0)])
def test_hot_samples_and_optimises_one_policy(remedy, temperature):
    model = build_model(len(TASK.vocabulary), 901)
    module = make_rl(remedy, model, TASK, SETTINGS, 901, None)
    rollouts, advantages, informative = rolled(module)
    mask = rollouts.agent_mask
    with torch.no_grad():
        logits = model(rollouts.sequences()[:, :-1]).logits[:, rollouts.prompts.shape[1] - 1 :].double()
    wanted = torch.log(torch.softmax(logits / temperature, -1)).gather(2, rollouts.tokens[..., None])[..., 0]
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


def test_another_learning_rate_and_other_groups_change_nothing_else():
    model = build_model(len(TASK.vocabulary), 901)
    settings = Settings()
    plain, faster, wider = (make_rl(r, model, TASK, settings, 901, None) for r in (None, "lr_3", "group_32"))
    rates = [m.configure_optimizers().param_groups[0]["lr"] for m in (plain, faster, wider)]
    assert rates == pytest.approx([5e-4, 1.5e-3, 5e-4])
    assert faster.settings == plain.settings == settings
    assert (wider.settings.prompts, wider.settings.group, wider.settings.rl_steps) == (4, 32, 40)
    assert wider.settings.rl_budget == settings.rl_budget == 5120
    assert {module.temperature for module in (plain, faster, wider)} == {1.0}


def test_lora_trains_its_adapters_and_nothing_else(monkeypatch):
    model = build_model(len(TASK.vocabulary), 901)
    before = copy.deepcopy(model)
    module = make_rl("lora", model, TASK, SETTINGS, 901, None)
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before(tokens).logits, atol=0, rtol=0)
    start = copy.deepcopy(model)
    rewarded(monkeypatch, [True] * 12, SETTINGS.group)
    trainer = reinforce(module)
    assert trainer.global_step == 6
    assert module.configure_optimizers().param_groups[0]["lr"] == pytest.approx(5e-3)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    linear = {name for name, m in before.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert {name.split(".lora_")[0] for name in trained} == linear
    assert len(trained) == 2 * len(linear) == 2 * 7 * 2
    assert {min(p.shape) for p in trained.values()} == {8}
    moved = {name for name, p in start.named_parameters() if not torch.equal(p, trained.get(name, p))}
    assert moved == set(trained)
    merged = {
        name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name not in trained
    }
    assert all(torch.equal(merged.pop(name), p) for name, p in before.named_parameters())
    assert not merged
    # What a layer computes: its frozen weight and alpha / rank = 2 times the product.
    layer, plain = model.model.layers[1].mlp.up_proj, before.model.layers[1].mlp.up_proj
    inputs = torch.randn(3, plain.in_features)
    a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), plain(inputs) + 2 * inputs @ a.T @ b.T)


def test_adapters_are_drawn_from_the_seed_alone():
    drawn = []
    for seed in (901, 901, 902):
        torch.rand(1)
        before = torch.get_rng_state()
        module = make_rl("lora", build_model(len(TASK.vocabulary), 901), TASK, SETTINGS, seed, None)
        assert torch.equal(before, torch.get_rng_state())
        drawn.append(module.model.model.layers[0].mlp.up_proj.lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("remedy", [None, *REMEDIES])
def test_every_remedy_counts_what_it_samples(remedy, base, monkeypatch):
    module = make_rl(remedy, build_model(len(TASK.vocabulary), 901), TASK, SETTINGS, 901, base)
    sampled = rewarded(monkeypatch, [True] * 100, module.settings.group)
    trainer = reinforce(module)
    times = 4 if remedy == "long_rl" else 1
    assert module.responses == sum(len(r.rewards) for r in sampled) == times * 3 * 4 * 4
    assert trainer.global_step == times * 3 * (
        1 if remedy == "group_32" else 2
    )  # one prompt is one minibatch
