"""Refit against a training loop written out here: what it moves, what follows, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from torch import nn

from lightning_rejuv import Refit, Reset, rejuvenate
from lightning_rejuv.calibration.batches import Batch
from tests.conftest import batch, float64_llama, greedy_batch, sharpened, tiny_llama

RATE = 3e-3


def data_of(base):
    """Calibration batches and base samples, as the caller passes them: padded, and of several lengths."""
    samples = [greedy_batch(base, rows=4, length=7, seed=5), batch(rows=3, length=11, seed=6)]
    return [batch(rows=3, seed=1), greedy_batch(base, rows=2, seed=2)], samples


def rows_of(batches):
    """Every row without its padding: ids and labels."""
    found = []
    for data in batches:
        mask = data.get("attention_mask", torch.ones_like(data["input_ids"])).bool()
        found += [(i[m], y[m]) for i, y, m in zip(data["input_ids"], data["labels"], mask, strict=True)]
    return found


def nll(model, row):
    """Summed negative log-likelihood of one response, nats."""
    ids, labels = row
    log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    told = labels[1:] != -100
    return -log_probs[torch.arange(len(ids) - 1), ids[1:]][told].sum()


def mean_nll(model, rows):
    with torch.no_grad():
        return float(sum(nll(model, row) for row in rows) / len(rows))


def by_hand(model, rows, steps, rate, size, seed=0):
    """AdamW without weight decay, as its paper has it, on the mean over rows that come in the order of a generator."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(rows), generator=generator).tolist()
    trained = [p for p in model.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p, dtype=torch.float64) for p in trained] for _ in range(2))
    for step in range(1, steps + 1):
        loss = sum(nll(model, rows[n]) for n in order[(step - 1) * size : step * size]) / size
        for p, m, v, g in zip(trained, first, second, torch.autograd.grad(loss, trained), strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g * g, alpha=0.001)
            change = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                p.sub_(rate * change)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("edit", [{"alpha": 1.0}, {"alpha": 0.4, "reset": Reset(fraction=0.1)}])
@pytest.mark.parametrize(("size", "seed"), [(5, 0), (32, 3)], ids=["some at a time", "all at a time"])
def test_it_is_plain_adamw_after_the_edit(edit, size, seed):
    base = float64_llama()
    sft = sharpened(base)
    calibration, samples = data_of(base)
    rows = rows_of(calibration) + rows_of(samples)
    expected = copy.deepcopy(sft)
    rejuvenate(expected, base, calibration if "reset" in edit else None, **edit)
    before = [mean_nll(expected, part) for part in (rows[:5], rows[5:], rows)]
    by_hand(expected, rows, 4, RATE, min(size, len(rows)), seed)
    refit = Refit(steps=4, learning_rate=RATE, batch_size=size)
    sampled_from = []

    def sampler(model):
        sampled_from.append(copy.deepcopy(model.state_dict()))
        return samples

    report = rejuvenate(sft, base, calibration, **edit, refit=refit, sampler=sampler, seed=seed)
    for (name, ours), theirs in zip(sft.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)
    assert len(sampled_from) == 1
    assert all(torch.equal(w, sampled_from[0][n]) for n, w in base.state_dict().items())
    found = report.refit
    assert found.demonstrations_before == pytest.approx(before[0], rel=1e-6)
    assert found.base_samples_before == pytest.approx(before[1], rel=1e-6)
    assert found.joint_before == pytest.approx(before[2], rel=1e-6)
    assert found.demonstrations_after == pytest.approx(mean_nll(expected, rows[:5]), rel=1e-6)
    assert found.joint_after == pytest.approx(mean_nll(expected, rows), rel=1e-6)
    assert found.joint_after < found.joint_before
    assert (found.demonstrations, found.base_samples, found.steps) == (5, 7, 4)
    assert found.batch_size == {5: 5, 32: 5 + 7}[size]
    assert found.weights == sum(p.numel() for p in sft.parameters())
    assert "4 steps of refit" in report.summary()
    assert f"{found.joint_before:.3f} -> {found.joint_after:.3f} nats a response" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["refit"]["steps"] == 4


def test_the_search_for_alpha_and_the_refit_see_the_same_samples():
    base = tiny_llama()
    _, samples = data_of(base)
    calls = []

    def sampler(model):
        calls.append(1)
        return samples

    model = sharpened(base)
    calibration = [greedy_batch(model, rows=5)]
    report = rejuvenate(model, base, calibration, reset=Reset(fraction=0.1), refit=Refit(2), sampler=sampler)
    assert len(calls) == 1
    assert report.search is not None
    assert report.refit.base_samples == 7


@pytest.mark.parametrize("alpha", [0.4, "auto"])
def test_samples_that_did_not_end_are_counted_and_doubted_once(alpha):
    base = tiny_llama()
    sft = sharpened(base)
    calibration = [greedy_batch(sft, rows=5)]
    samples = [greedy_batch(base, rows=4, seed=n) for n in (2, 3)]
    doubt = "3 of the base's 8 samples did not end"
    for ended, unfinished in (([True] * 4, 0), ([False] * 3 + [True], 3), (None, None)):
        told = [
            {**samples[0], **({} if ended is None else {"finished": torch.tensor(ended)})},
            {**samples[1], **({} if ended is None else {"finished": torch.tensor([True] * 4)})},
        ]
        options = {"alpha": alpha, "refit": Refit(2), "sampler": lambda _, t=told: t}
        report = rejuvenate(copy.deepcopy(sft), base, calibration, **options)
        found = report.to_dict()["refit"]
        assert found["unfinished"] == unfinished
        assert [text[: len(doubt)] for text in found["doubts"]] == ([doubt] if unfinished == 3 else [])
        assert str(report).count(doubt) == (unfinished == 3)
        (row,) = [line for line in str(report).splitlines() if "responses that the base sampled" in line]
        assert row.endswith(f"sampled, {unfinished} of them unfinished" if unfinished else "sampled")


def test_without_a_sampler_the_base_continues_the_calibration_prompts():
    base = tiny_llama()
    calibration, _ = data_of(base)
    options = {"alpha": 0.5, "refit": Refit(2, RATE)}
    models = [sharpened(base) for _ in range(3)]
    reports = [
        rejuvenate(m, base, calibration, **options, seed=s) for m, s in zip(models, (0, 0, 1), strict=True)
    ]
    assert reports[0].refit.base_samples == 5
    assert reports[0].refit.base_samples_before == reports[1].refit.base_samples_before
    assert reports[0].refit.base_samples_before != reports[2].refit.base_samples_before
    assert unchanged(models[1], state(models[0]))


def test_it_leaves_no_trace_and_needs_no_mode():
    base = tiny_llama(attention_dropout=0.3)
    calibration, samples = data_of(base)
    options = {"alpha": 0.5, "refit": Refit(3, RATE), "sampler": lambda _: samples}
    plain = sharpened(base)
    rejuvenate(plain, base, calibration, **options)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        model = sharpened(base).train()
        model.model.layers[0].eval()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        modes = [module.training for module in model.modules()]
        torch.manual_seed(7)
        random = torch.get_rng_state()
        with mode():
            rejuvenate(model, base, calibration, **options)
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in model.modules()] == modes
        assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
        assert not any(p._backward_hooks for p in model.parameters())
        assert unchanged(model, state(plain))


def test_frozen_parameters_stay_bitwise():
    base = tiny_llama()
    sft = sharpened(base)
    for name, parameter in sft.named_parameters():
        parameter.requires_grad_("mlp" in name)
    calibration, samples = data_of(base)
    options = {"alpha": 0.4}
    fused = copy.deepcopy(sft)
    rejuvenate(fused, base, **options)
    report = rejuvenate(sft, base, calibration, refit=Refit(2, RATE), sampler=lambda _: samples, **options)
    for (name, ours), theirs in zip(sft.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(ours, theirs) == ("mlp" not in name), name
        assert ours.requires_grad == ("mlp" in name)
    assert report.refit.weights == sum(p.numel() for p in sft.parameters() if p.requires_grad)


def test_tied_weights_stay_tied():
    base = tiny_llama(tie_word_embeddings=True)
    sft = sharpened(base)
    calibration, samples = data_of(base)
    options = {"alpha": 1.0, "reset": Reset(fraction=0.1), "sampler": lambda _: samples}
    rejuvenate(sft, base, calibration, refit=Refit(2, RATE), **options)
    assert sft.lm_head.weight is sft.model.embed_tokens.weight
    assert not torch.equal(sft.lm_head.weight, base.lm_head.weight)


def test_only_the_adapter_is_trained():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny_llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(sharpened(base), config)
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.set_adapter("default")
    calibration, samples = data_of(base)
    before, expected = state(model), copy.deepcopy(model)
    rejuvenate(expected, None, alpha=0.5)
    rows = rows_of(calibration) + rows_of(samples)
    by_hand(expected, rows, 3, 2e-4, len(rows))  # the rate of adapters, where none is named
    options = {"alpha": 0.5, "refit": Refit(3), "sampler": lambda _: samples}
    report = rejuvenate(model, None, calibration, **options)
    reference = state(expected)
    for name, parameter in model.named_parameters():
        trained = "lora_" in name and ".default." in name
        assert torch.equal(parameter, before[name]) != trained, name
        torch.testing.assert_close(parameter, reference[name], rtol=1e-4, atol=1e-6, msg=name)
    assert report.refit.learning_rate == 2e-4
    assert report.refit.weights == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_weights_of_an_adapter_that_is_not_active_are_not_counted():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny_llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(sharpened(base), config)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.01)
    calibration, samples = data_of(base)
    before = state(model)
    options = {"alpha": 1.0, "refit": Refit(2), "sampler": lambda _: samples}
    report = rejuvenate(model, None, calibration, **options)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".other." in n)
    assert 2 * report.refit.weights == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_batch_takes_no_more_memory_than_the_data(monkeypatch):
    base = tiny_llama()
    calibration, samples = data_of(base)
    calibration, samples = (
        [{k: v[:1] for k, v in b.items()} for b in part] for part in (calibration, samples)
    )
    seen = []
    sft = sharpened(base)
    sft.register_forward_pre_hook(lambda *a: seen.append(a[2]["input_ids"].shape), with_kwargs=True)
    options = {"alpha": 1.0, "sampler": lambda _: samples}
    rejuvenate(sft, base, calibration, **options, refit=Refit(2, RATE, batch_size=4))
    assert max(rows * width for rows, width in seen) <= 11
    assert len(seen) == 4 + 2 * 4 + 4  # one row a pass: the losses, two steps, the losses


def test_many_steps_hold_no_more_batches_than_few():
    base = tiny_llama()
    calibration, samples = data_of(base)
    most = []
    for steps in (2, 20):
        sft, held = sharpened(base), []
        sft.register_forward_pre_hook(
            lambda *_, held=held: held.append(sum(type(o) is Batch for o in gc.get_objects()))
        )
        options = {"alpha": 1.0, "sampler": lambda _: samples}
        rejuvenate(sft, base, calibration, **options, refit=Refit(steps, RATE, batch_size=4))
        most.append(max(held))
    assert most[0] == most[1]


class Lookahead(torch.optim.SGD):
    """Keeps slow weights, and with float32 masters of half-precision parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "momentum_buffer": torch.ones_like(p),
                    "slow_buffer": p.detach().float() + 0.01,
                    "exp_avg_sq": torch.ones_like(p),
                }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_optimizers_hold_follows(dtype):
    base = tiny_llama(dtype=dtype)
    sft = sharpened(base)
    calibration, samples = data_of(base)
    options = {"alpha": 0.5}
    fused = copy.deepcopy(sft)
    plain = Lookahead(fused.parameters())
    rejuvenate(fused, base, **options, optimizer=plain)
    optimizer = Lookahead(sft.parameters())
    options |= {"refit": Refit(3, RATE), "sampler": lambda _: samples}
    rejuvenate(sft, base, calibration, **options, optimizer=optimizer)
    for ours, theirs in zip(sft.parameters(), fused.parameters(), strict=True):
        moved = optimizer.state[ours]["slow_buffer"] - plain.state[theirs]["slow_buffer"]
        torch.testing.assert_close(
            moved, (ours - theirs).float(), rtol=0, atol=1e-6 if dtype.itemsize == 4 else 0.01
        )
        assert float(moved.abs().max()) > RATE / 2
        assert not optimizer.state[ours]["momentum_buffer"].any()
        assert bool((optimizer.state[ours]["exp_avg_sq"] == 1).all())


def test_a_refit_alone_is_forgotten_by_the_optimizer_too():
    base = tiny_llama()
    sft = sharpened(base)
    sft.model.embed_tokens.weight.requires_grad_(False)
    optimizer = Lookahead(sft.parameters())
    calibration, samples = data_of(base)
    options = {"alpha": 1.0, "sampler": lambda _: samples}
    rejuvenate(sft, base, calibration, **options, optimizer=optimizer, refit=Refit(1, RATE))
    for name, parameter in sft.named_parameters():
        assert bool(optimizer.state[parameter]["momentum_buffer"].any()) == ("embed" in name), name
