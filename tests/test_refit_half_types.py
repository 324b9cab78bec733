"""Refit of half types: what bfloat16 cannot hold, and which weights the reported loss is of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import Refit, Reset, rejuvenate
from tests.conftest import greedy_batch, sharpened, tiny_llama
from tests.test_refit import data_of, rows_of, state


def mean_nll_in_batches(model, batches):
    """As :func:`mean_nll`, from hidden states, in the batches of the data: bfloat16 rounds otherwise for each shape."""
    total = rows = 0
    for data in batches:
        with torch.no_grad():
            hidden = model.model(input_ids=data["input_ids"]).last_hidden_state[:, :-1].double()
            log_probs = (hidden @ model.lm_head.weight.double().t()).log_softmax(-1)
        told = -log_probs.gather(-1, data["input_ids"][:, 1:, None])[..., 0][data["labels"][:, 1:] != -100]
        total, rows = total + float(told.double().sum()), rows + len(data["input_ids"])
    return total / rows


def test_frozen_weights_in_float16_below_adapters_in_float32_are_no_reason_to_refuse():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny_llama()
    calibration, samples = data_of(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    moves = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base).to(dtype), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        before = state(model)
        options = {"alpha": 1.0, "refit": Refit(3), "sampler": lambda _: samples}
        rejuvenate(model, None, calibration, **options)
        moves.append(
            torch.cat([(p - before[n]).detach().float().flatten() for n, p in model.named_parameters()])
        )
    assert nn.functional.cosine_similarity(*moves, dim=0) > 0.98


def test_steps_that_bfloat16_alone_would_lose_add_up():
    base = tiny_llama(dtype=torch.bfloat16)
    sft = sharpened(base)
    with torch.no_grad():  # far from zero, where the last place is 2^-7 or 2^-8
        sft.lm_head.weight.copy_(sft.lm_head.weight.sign() * (1 + sft.lm_head.weight.abs() / 4))
    calibration = [greedy_batch(base, rows=4, seed=1)]
    samples = [greedy_batch(base, rows=4, seed=2)]
    rate, steps = 5e-4, 12
    before, expected = state(sft), copy.deepcopy(sft)
    masters = {name: p.detach().float().requires_grad_() for name, p in expected.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=rate, weight_decay=0.0)
    rows = rows_of(calibration) + rows_of(samples)
    stack = {k: torch.stack([row[i] for row in rows]) for i, k in enumerate(("input_ids", "labels"))}
    for _ in range(steps):
        logits = expected(input_ids=stack["input_ids"]).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), stack["labels"][:, 1:].flatten(), reduction="sum"
        )
        names, parameters = zip(*expected.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(loss / len(rows), parameters), strict=True):
            masters[name].grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in zip(names, parameters, strict=True):
                parameter.copy_(masters[name])
    options = {"alpha": 1.0, "rounding": "nearest", "sampler": lambda _: samples}
    report = rejuvenate(sft, base, calibration, **options, refit=Refit(steps, rate))
    head = sft.lm_head.weight
    assert rate < 0.5 * torch.finfo(torch.bfloat16).eps / 2  # no step alone reaches half a last place above 1
    assert (head != before["lm_head.weight"]).float().mean() > 0.2
    assert head.dtype == torch.bfloat16
    same = total = 0
    for name, parameter in sft.named_parameters():
        same += int((parameter == masters[name].bfloat16()).sum())
        total += parameter.numel()
    assert same > 0.95 * total  # the batch's rows are added up in another order here
    assert report.refit.joint_after < report.refit.joint_before


def test_stochastic_rounding_is_right_on_average():
    base = tiny_llama(dtype=torch.bfloat16)
    calibration = [greedy_batch(base, rows=4, seed=1)]
    options = {"alpha": 1.0, "sampler": lambda _: calibration, "refit": Refit(1, 1e-4)}
    model, before = sharpened(base), sharpened(base)
    rejuvenate(model, base, calibration, **options)
    moved = (model.lm_head.weight.double() - before.lm_head.weight.double()).detach()
    # Nearly every weight moves by the learning rate, less than half of its last place: to nearest, none would.
    nearest = sharpened(base)
    rejuvenate(nearest, base, calibration, **options, rounding="nearest")
    large = before.lm_head.weight.abs() > 0.1
    assert not (nearest.lm_head.weight != before.lm_head.weight)[large].any()
    assert moved[large].any()
    assert float(moved[large].abs().mean()) == pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reported_loss_is_that_of_the_model_that_is_left(dtype, rounding, recwarn):
    """Before the steps that of the edit alone; at the default rate, most of whose steps bfloat16 cannot hold."""
    for seed in (0, 4):
        base = tiny_llama(seed, dtype=dtype)
        sft = sharpened(base)
        calibration, samples = [greedy_batch(sft, rows=8)], [greedy_batch(base, rows=8, seed=3)]
        options = {
            "alpha": 0.4,
            "reset": Reset(fraction=0.05),
            "rounding": rounding,
            "sampler": lambda _, s=samples: s,
        }
        plain = copy.deepcopy(sft)
        rejuvenate(
            plain, base, calibration, **{name: value for name, value in options.items() if name != "sampler"}
        )
        found = rejuvenate(sft, base, calibration, **options, refit=Refit(5)).refit
        for model, told in (
            (plain, (found.demonstrations_before, found.base_samples_before)),
            (sft, (found.demonstrations_after, found.base_samples_after)),
        ):
            real = [mean_nll_in_batches(model, part) for part in (calibration, samples)]
            assert told == pytest.approx(real, rel=1e-6)
        if rounding == "stochastic":
            assert found.joint_after < found.joint_before
    assert rounding == "nearest" or not [w for w in recwarn if "raised the loss" in str(w.message)]


def test_every_pass_sees_the_weights_that_the_edit_would_leave_then():
    """In bfloat16, with steps of which nearly none is half a last place."""
    base = tiny_llama(dtype=torch.bfloat16)
    data = [greedy_batch(base, rows=4, seed=1)]
    options = {"alpha": 0.4, "sampler": lambda _: data}
    heads = []
    sft = sharpened(base)
    sft.register_forward_pre_hook(lambda *_: heads.append(sft.lm_head.weight.detach().clone()))
    rejuvenate(sft, base, data, **options, refit=Refit(3, 1e-4, 8))
    assert len(heads) == 2 + 3 * 2 + 2  # the losses, three steps in two passes each, the losses
    for steps in (1, 2):
        left = sharpened(base)
        rejuvenate(left, base, data, **options, refit=Refit(steps, 1e-4, 8))
        assert (heads[2 + 2 * steps] == left.lm_head.weight).float().mean() > 0.999
    assert torch.equal(heads[-1], sft.lm_head.weight)
    assert (heads[4] != heads[2]).float().mean() > 0.01
