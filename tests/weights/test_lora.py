"""Fusion and reset of adapters against the same on the merged weights."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.alpha.sampling import sample_with_generate
from lightning_rejuv.attribution import confidence, nll_per_response
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.neurons import find_decoder
from tests import families
from tests.conftest import batch, greedy_batch, tiny_llama

peft = pytest.importorskip("peft", reason="peft is not installed")

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(base, seed=3, **options):
    """A PEFT model whose adapter has been trained: B is not zero, and the logits have grown."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": EVERYWHERE, **options}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


def _close(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, rtol=1e-5, atol=1e-6)


CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "some modules": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "lora bias": {"lora_bias": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_fusion_of_the_adapter_is_fusion_of_the_merged_weights(options):
    base = tiny_llama(attention_bias="lora_bias" in options, mlp_bias="lora_bias" in options)
    model = adapted(base, **options)
    whole = merged(model)
    expected = rejuvenate(whole, base, alpha=0.3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = rejuvenate(model, None, alpha=0.3)
    _close(merged(model), whole)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("lora_B", "modules_to_save", "magnitude")):
            assert torch.equal(parameter, before[name]), name
    by_name = {t.name: t.drift_before for t in expected.tensors}
    for tensor in report.tensors:
        if tensor.name.startswith("base_model.model.model"):
            plain = tensor.name.removeprefix("base_model.model.")
            assert tensor.drift_before == pytest.approx(by_name[plain], rel=1e-4)


@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}])
def test_reset_of_the_adapter_is_reset_of_the_merged_weights(options, quantity):
    base = tiny_llama()
    model = adapted(base, **options)
    data = [greedy_batch(base, seed=s) for s in range(3)]
    whole, untouched = merged(model), merged(model)
    how = {"alpha": 1.0, "reset": Reset(fraction=0.1, positions="entropy_gap", quantity=quantity)}
    report = rejuvenate(model, None, data, **how)
    assert report.attribution is not None
    assert (report.attribution.reconstruction_error or 0.0) < 1e-4
    if not options:  # every projection has an adapter: the same neurons as on the merged weights
        reference = rejuvenate(whole, base, data, **how)
        assert [g.reset for g in report.neurons] == [g.reset for g in reference.neurons]
        _close(merged(model), whole)
    after, moved = merged(model), 0
    groups = find_decoder(after).groups
    for group in groups:
        now, was, there = (m.get_parameter(group.parameter) for m in (after, untouched, base))
        changed = ((now - was).abs() > 1e-7).any(1 - group.dim).nonzero().flatten()
        moved += len(changed)
        pick = [t.index_select(group.dim, changed) for t in (now, there)]
        torch.testing.assert_close(*pick, rtol=1e-6, atol=1e-7)
        if options and group.kind not in ("q", "v", "down"):
            assert not len(changed)
    assert moved == report.neurons_reset > 0


def test_what_scaling_the_adapter_cannot_do_is_refused():
    base = tiny_llama()
    dora = adapted(base, use_dora=True)
    for options in ({"reset": Reset(fraction=0.1)}, {"alpha": "auto"}):
        with pytest.raises(ValueError, match="with DoRA adapters, which can be fused but not reset"):
            rejuvenate(dora, None, [greedy_batch(base)], **options)
    quantised = adapted(base)
    layer = quantised.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        rejuvenate(quantised, None, alpha=0.5)
    model = adapted(base)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged. Call `model.unmerge_adapter\(\)`"):
        rejuvenate(model, None, alpha=0.5)
    with pytest.raises(ValueError, match="Expected an `anchor` but got None"):
        rejuvenate(base, None, alpha=0.5)


def test_an_automatic_alpha_samples_with_generate_from_the_base_under_the_adapter():
    base = tiny_llama()
    model = adapted(base)
    data = [greedy_batch(model, rows=40, seed=s) for s in range(2)]
    batches = batches_for(model, data)
    with model.disable_adapter():
        own = batches_for(model, sample_with_generate(batches, 0)(model), "sampled")
        known = nll_per_response([confidence(model, batch) for batch in own])
    theirs = nll_per_response([confidence(model, batch) for batch in own])
    report = rejuvenate(model, None, data, alpha="auto")
    assert 0 < report.alpha == report.search.alpha < 1
    ends = [report.search.curve[end].base_samples for end in (0, -1)]
    assert ends == pytest.approx([known, theirs], rel=1e-5)
    assert known < theirs


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_a_dora_fusion(alpha):
    base = tiny_llama()
    model = adapted(base, use_dora=True)
    expected = base if alpha == 0 else merged(model)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1.0)
    rejuvenate(model, None, alpha=alpha, optimizer=optimizer)
    _close(merged(model), expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            forgotten = alpha < 1 and "lora_A" not in name
            assert bool(optimizer.state[parameter]["exp_avg"].any()) != forgotten, name


def test_layers_that_store_their_weights_transposed():
    """GPT-2's Conv1D: the weight lies as [in, out], the adapter's factors as ever."""
    base = families.tiny("gpt2")
    model = adapted(base, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    whole = merged(model)
    data = [batch(vocabulary=61, seed=s) for s in range(3)]
    how = {"reset": Reset(fraction=0.1, positions="entropy_gap", quantity="target_logit")}
    report = rejuvenate(model, None, data, alpha=0.7, **how)
    expected = rejuvenate(whole, base, data, alpha=0.7, **how)
    _close(merged(model), whole)
    assert [g.reset for g in report.neurons] == [g.reset for g in expected.neurons]
    by_name = {t.name: t for t in expected.tensors}
    compared = 0
    for tensor in report.tensors:
        plain = by_name.get(tensor.name.removeprefix("base_model.model."))
        if plain is not None:
            assert tensor.drift_before == pytest.approx(plain.drift_before, rel=1e-4)
            assert tensor.drift_after == pytest.approx(plain.drift_after, rel=1e-4)
            compared += 1
    assert compared == 2 * 4
