"""The rules for alpha that the study compared, against fusions and likelihoods of their own."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import rejuvenate
from studies.former_rules import JOINT, TARGETS, find_alpha, golden_section
from tests.conftest import sharpened, tiny_llama


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama()
    return base, sharpened(base)


@torch.no_grad()
def respond(model):
    """Responses to 64 prompts of three tokens; every second one is right."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 23, (64, 8), generator=generator)
    for time in range(3, 8):
        logits = model(input_ids=ids[:, :time]).logits[:, -1]
        ids[:, time] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels, "solved": torch.arange(64) % 2 == 0}


@torch.no_grad()
def log_probs(model, ids):
    return model(input_ids=ids).logits[:, 2:-1].double().log_softmax(-1)


def nll(model, batch):
    found = log_probs(model, batch["input_ids"])
    return -float(found.gather(2, batch["input_ids"][:, 3:, None]).sum()) / len(found)


def entropy(model, batch):
    found = log_probs(model, batch["input_ids"])
    return float(-(found.exp() * found).sum(-1).mean())


def value(rule, pair, alpha):
    base, sft = pair
    model, own, theirs = copy.deepcopy(sft), respond(base), respond(sft)
    rejuvenate(model, base, alpha=alpha)
    if rule == "entropy_ratio":
        return 1 - entropy(model, own) / entropy(base, own)
    if rule == "support_retention":
        own = {name: tensor[own["solved"]] for name, tensor in own.items()}
    excess = nll(model, own) - nll(base, own)
    return excess - (nll(model, theirs) - nll(sft, theirs) if rule == "kl_balance" else 0.0)


# The SFT model here loses a third of the base's entropy, less than the rule's own target.
CASES = [
    ("auto", None),
    ("support_retention", None),
    ("kl_balance", None),
    ("entropy_ratio", 0.2),
    ("auto", 0.5),
]


@pytest.mark.parametrize(("rule", "target"), CASES)
def test_the_largest_alpha_that_meets_the_target(pair, rule, target, tmp_path):
    base, sft = pair
    base.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(sft.state_dict())
    alpha = find_alpha(rule, sft, tmp_path / "base", respond, target)
    wanted = TARGETS[rule] if target is None else target
    assert 0 < alpha < 1
    assert value(rule, pair, alpha) <= wanted + 1e-4
    assert value(rule, pair, alpha + 0.01) > wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in sft.state_dict().items())


def test_a_model_that_is_the_base_keeps_alpha_1(pair, tmp_path):
    base, _ = pair
    base.save_pretrained(tmp_path / "base")
    assert find_alpha("auto", copy.deepcopy(base), tmp_path / "base", respond) == 1.0


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_the_joint_alpha_is_where_a_grid_over_fused_models_has_its_minimum(pair, share, tmp_path):
    base, sft = pair
    base.save_pretrained(tmp_path / "base")
    own = respond(base)
    taught = {
        name: rows[: round(share * 64)] for name, rows in respond(sft).items()
    }  # two batches, of other sizes
    taught = [{name: rows[part] for name, rows in taught.items()} for part in (slice(0, 5), slice(5, None))]

    def joint(alpha):
        model = copy.deepcopy(sft)
        rejuvenate(model, base, alpha=alpha)
        return sum(nll(model, batch) * len(batch["input_ids"]) for batch in (*taught, own))

    grid = [number / 100 for number in range(1, 100)]
    best = min(grid, key=joint)
    before = copy.deepcopy(sft.state_dict())
    alpha = find_alpha(JOINT, sft, tmp_path / "base", respond, demonstrations=taught)
    assert 0.05 < best < 0.95
    assert abs(alpha - best) <= 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in sft.state_dict().items())


@pytest.mark.parametrize("minimum", [0.0, 0.1234, 0.5, 0.987, 1.0])
def test_the_golden_section_comes_within_its_tolerance_in_twelve_evaluations(minimum):
    tried = []

    def value(alpha):
        tried.append(alpha)
        return abs(alpha - minimum)

    assert abs(golden_section(value) - minimum) <= 0.0026
    assert len(tried) == len(set(tried)) == 12
