from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import rejuvenate
from lightning_rejuv.alpha import default_target
from lightning_rejuv.calibration import as_batches
from lightning_rejuv.sampling import sample_with_generate
from tests.conftest import greedy_batch, sharpened, tiny_llama


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


@torch.no_grad()
def sample(model, rows=48, seed=4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 23, (rows, 8), generator=generator)
    for time in range(3, 8):
        logits = model(input_ids=ids[:, :time]).logits[:, -1]
        ids[:, time] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    labels = ids.clone()
    labels[:, :3] = -100
    return [{"input_ids": ids, "labels": labels}]


def _log_probs(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits[:, 2:-1].double().log_softmax(-1)


def nll(model, batch):
    found = _log_probs(model, batch).gather(2, batch["input_ids"][:, 3:, None])
    return -float(found.sum()) / len(found)


def entropy(model, batch):
    log_probs = _log_probs(model, batch)
    return -float((log_probs.exp() * log_probs).sum(-1).mean())


def fused(pair, alpha):
    model = copy.deepcopy(pair[1])
    rejuvenate(model, pair[0], alpha=alpha, reset_fraction=0)
    return model


def verifier(batch):
    return batch["input_ids"][:, -1] % 2 == 0


def value(rule, pair, alpha):
    """What the rule measures, written down again."""
    base, sft = pair
    [own] = sample(base)
    if rule == "support_retention":
        keep = verifier(own)
        own = {name: tensor[keep] for name, tensor in own.items()}
    model = fused(pair, alpha)
    if rule == "entropy_ratio":
        return 1 - entropy(model, own) / entropy(base, own)
    excess = nll(model, own) - nll(base, own)
    if rule == "kl_balance":
        [theirs] = sample(sft)
        return excess - (nll(model, theirs) - nll(sft, theirs))
    return excess


@pytest.mark.parametrize("rule", ["auto", "support_retention", "kl_balance", "entropy_ratio"])
def test_every_rule_finds_where_its_value_reaches_the_target(pair, rule):
    target = {"auto": 0.2, "support_retention": 0.2, "kl_balance": 0.0, "entropy_ratio": 0.1}[rule]
    options = {} if rule == "kl_balance" else {"alpha_target": target}
    model = copy.deepcopy(pair[1])
    report = rejuvenate(
        model, pair[0], alpha=rule, reset_fraction=0, sampler=sample, verifier=verifier, **options
    )
    assert report.search is not None
    assert report.search.rule == rule
    assert 0 < report.search.alpha < 1
    assert value(rule, pair, report.search.alpha) <= target + 1e-4
    assert value(rule, pair, report.search.alpha + 0.01) > target
    for alpha, found in report.search.curve[::3]:
        assert found == pytest.approx(value(rule, pair, alpha), abs=1e-3)


def test_the_default_target_follows_long_responses_only():
    assert default_target("auto", 5) == default_target("auto", 20) == 1.0
    assert default_target("auto", 400) == pytest.approx(20.0)
    assert default_target("support_retention", 400) == 2.0


def test_a_verifier_that_accepts_nothing(pair):
    options = {"alpha": "support_retention", "reset_fraction": 0, "sampler": sample}
    with pytest.raises(ValueError, match="the verifier accepts none"):
        rejuvenate(pair[1], pair[0], verifier=lambda b: torch.zeros(len(b["input_ids"])), **options)


@pytest.mark.parametrize("answer", [lambda b: True, lambda b: torch.ones(7), lambda b: torch.ones(48, 8)])
def test_a_verifier_that_does_not_answer_for_each_row(pair, answer):
    options = {"alpha": "support_retention", "reset_fraction": 0, "sampler": sample, "verifier": answer}
    with pytest.raises(ValueError, match="one bool for each of the 48 rows of sampled batch 0 but got shape"):
        rejuvenate(pair[1], pair[0], **options)


def test_what_the_verifier_keeps_is_kept_of_every_tensor_by_row(pair):
    """A list does as an answer; what is no tensor by row stays as it is."""
    base, sft = pair
    extras = {
        "solved": torch.arange(48),
        "attention_mask": torch.ones(48, 8),
        "task": "any",
        "count": torch.tensor(3),
    }
    found = [
        rejuvenate(
            copy.deepcopy(sft),
            base,
            alpha="support_retention",
            reset_fraction=0,
            sampler=lambda m, more=more: [{**sample(m)[0], **more}],
            verifier=verify,
            alpha_target=0.2,
        ).search.curve
        for more, verify in (({}, verifier), (extras, lambda b: (b["input_ids"][:, -1] % 2 == 0).tolist()))
    ]
    assert found[0] == found[1]


def test_the_default_sampler_continues_every_prompt_and_labels_up_to_the_end(pair):
    base, _ = pair
    base.generation_config.eos_token_id = [7, 9]
    base.generation_config.pad_token_id = 0
    ragged = greedy_batch(base, rows=30, length=12)
    ragged["labels"][:10, :5] = -100  # prompts of five tokens beside prompts of three
    sampler = sample_with_generate(as_batches([ragged]), seed=0)
    samples = sampler(base)
    assert sum(len(s["input_ids"]) for s in samples) == 30
    for batch, start, prompts in zip(
        samples, (5, 3), (ragged["input_ids"][:10], ragged["input_ids"][10:]), strict=True
    ):
        assert torch.equal(batch["input_ids"][:, :start], prompts[:, :start])
        assert batch["input_ids"].shape[1] <= start + 9
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            ends = [i for i in range(start, len(ids)) if ids[i] in (7, 9)]
            last = ends[0] if ends else len(ids) - 1
            assert labels == [-100] * start + ids[start : last + 1] + [-100] * (len(ids) - last - 1)
    again = sample_with_generate(as_batches([ragged]), seed=0)(base)
    assert torch.equal(again[0]["input_ids"], samples[0]["input_ids"])
    other = sample_with_generate(as_batches([ragged]), seed=1)(base)
    assert not torch.equal(other[0]["input_ids"], samples[0]["input_ids"])


@pytest.mark.parametrize(("lengths", "target"), [((5, 5), 1.0), ((50, 20), 2.0)])
def test_the_default_target_is_that_of_the_tokens_in_a_response(pair, lengths, target):
    """Four responses and two in a batch, of so many tokens each: 40 on average is two nats."""

    def sampler(model):
        batches = []
        for rows, length in zip((4, 2), lengths, strict=True):
            ids = torch.randint(1, 23, (rows, 3 + length), generator=torch.Generator().manual_seed(length))
            labels = ids.clone()
            labels[:, :3] = -100
            batches.append({"input_ids": ids, "labels": labels})
        return batches

    report = rejuvenate(pair[1], pair[0], alpha="auto", reset_fraction=0, sampler=sampler)
    assert report.search.target == pytest.approx(target)
