"""Adapters beside other adapters, and adapters that cannot be fused in place: against the merged weights."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.neurons import find_decoder
from tests.conftest import batch, greedy_batch, tiny_llama
from tests.families import tiny
from tests.weights.test_lora import _close, adapted, merged

peft = pytest.importorskip("peft", reason="peft is not installed")

CHANGE_THE_BASE = ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"]


def _second(base, trained=True, **options):
    """A first adapter on every projection, trained; and the active second one on two of them."""
    model = adapted(base, modules_to_save=["lm_head"])
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], **options}
    model.add_adapter("two", peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.set_adapter("two")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained and ".two." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 12).view(1, -1)).logits


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_second_adapter_on_fewer_modules_is_fused_and_the_first_is_left(options, alpha):
    base = tiny_llama()
    model = _second(base, **options)
    whole = copy.deepcopy(model).merge_and_unload(adapter_names=["two"])
    torch.testing.assert_close(_logits(whole), _logits(model), rtol=1e-4, atol=1e-4)
    expected = rejuvenate(whole, base, alpha=alpha)
    before = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    report = rejuvenate(model, None, alpha=alpha)
    torch.testing.assert_close(_logits(model), _logits(whole), rtol=1e-4, atol=1e-4)
    assert before
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
    there = {t.name: t.drift_before for t in expected.tensors if t.drift_before}
    ours = {t.name.removeprefix("base_model.model."): t.drift_before for t in report.tensors}
    named = {name.replace("lm_head.modules_to_save.two.", "lm_head."): drift for name, drift in ours.items()}
    assert named == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
def test_the_reset_of_a_second_adapter_counts_the_models_neurons(quantity):
    base = tiny_llama()
    model = _second(base)
    whole = copy.deepcopy(model).merge_and_unload(adapter_names=["two"])
    data = [greedy_batch(base, seed=seed) for seed in range(3)]
    options = {"alpha": 1.0, "reset": Reset(fraction=0.05, positions="entropy_gap", quantity=quantity)}
    expected = rejuvenate(whole, base, data, **options)
    report = rejuvenate(model, None, data, **options)
    assert report.neurons_total == expected.neurons_total == sum(g.count for g in find_decoder(base).groups)
    assert report.neurons_asked == expected.neurons_asked
    by_kind = {group.kind: 0 for group in report.neurons}
    for group in report.neurons:
        by_kind[group.kind] += group.reset
    assert {kind for kind, count in by_kind.items() if count} <= {"q", "down"}
    if quantity == "entropy_gradient":  # a neuron without an adapter has no score there either
        assert [g.reset for g in report.neurons] == [g.reset for g in expected.neurons]
        torch.testing.assert_close(_logits(model), _logits(whole), rtol=1e-4, atol=1e-4)


def test_neurons_under_adapters_on_some_projections_are_the_models():
    base = tiny_llama()
    model = adapted(base, target_modules=["v_proj"])
    whole = merged(model)
    data = [greedy_batch(base, seed=seed) for seed in range(3)]
    for scope in ("model", "layer", "module"):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(whole)
        options = {"alpha": 1.0, "reset": Reset(fraction=0.1, scope=scope, positions="entropy_gap")}
        report, expected = rejuvenate(ours, None, data, **options), rejuvenate(theirs, base, data, **options)
        assert report.neurons_total == expected.neurons_total == 2 * (16 + 8 + 8 + 16 + 12 + 12 + 12)
        assert [g.reset for g in report.neurons] == [g.reset for g in expected.neurons]
        assert "asked for" in str(report)
        _close(merged(ours), theirs)


def test_experts_under_adapters_of_the_attention_are_the_bases_own():
    base = tiny("mixtral")
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    whole = merged(model)
    data = [batch(vocabulary=61)]
    options = {"alpha": 1.0, "reset": Reset(fraction=0.1, positions="entropy_gap")}
    expected, report = rejuvenate(whole, base, data, **options), rejuvenate(model, None, data, **options)
    assert report.neurons_total == expected.neurons_total
    assert sum(g.reset for g in report.neurons if g.kind in ("gate", "up", "down")) == 0
    _close(merged(model), whole)


@pytest.mark.parametrize("start", CHANGE_THE_BASE)
def test_adapters_whose_initialisation_changed_the_base_are_refused(start):
    base = tiny_llama()
    if start in ("pissa", "pissa_niter_4", "olora"):
        model = adapted(base, init_lora_weights=start, target_modules=["q_proj", "down_proj"])
    else:  # they need data or another package; what counts is what the config says
        model = adapted(base, target_modules=["q_proj", "down_proj"])
        model.peft_config["default"].init_lora_weights = start
    before = {name: p.clone() for name, p in model.named_parameters()}
    for outer in (model, model.base_model, model.base_model.model):
        for anchor in (None, base):
            with pytest.raises(
                ValueError, match=f"The adapter 'default' was initialised with '{start}', which changes"
            ):
                rejuvenate(outer, anchor, alpha=0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    whole = merged(model)
    rejuvenate(whole, base, alpha=0.0)
    _close(whole, base)


def test_a_pissa_adapter_that_was_converted_is_a_plain_one(tmp_path):
    base = tiny_llama()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    whole = merged(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    for (name, p), q in zip(merged(plain).named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, rtol=1e-4, atol=1e-4)
    rejuvenate(plain, None, alpha=0.0)
    _close(merged(plain), base)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_adapters_whose_initialisation_left_the_base_go_back_to_it(start):
    base = tiny_llama()
    model = adapted(base, init_lora_weights=start, target_modules=["q_proj", "down_proj"])
    rejuvenate(model, None, alpha=0.0)
    _close(merged(model), base)


def test_states_of_adapters_that_are_refused():
    base = tiny_llama()
    model = _second(base)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"are disabled, so that the model is its base"),
    ):
        rejuvenate(model, None, alpha=0.5)
    model.merge_adapter(adapter_names=["default"])
    with pytest.raises(ValueError, match=r"is merged. Call `model.unmerge_adapter\(\)`"):
        rejuvenate(model, None, alpha=0.5)
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match=r"one active LoRA adapter but got \['default', 'two'\]"):
        rejuvenate(model, None, alpha=0.5)
    untrained = _second(base, trained=False)
    with pytest.raises(ValueError, match="or activate the adapter that was trained"):
        rejuvenate(untrained, None, alpha=0.5)
    embedding = adapted(base, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"'base_model.model.model.embed_tokens' is an adapted embedding"):
        rejuvenate(embedding, None, alpha=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "'IA3'",
        ),
        (lambda: peft.LoHaConfig(target_modules=["q_proj"]), "'LOHA'"),
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "'ADALORA'"),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
            "trainable_token_indices",
        ),
    ],
)
def test_adapters_of_another_kind_are_refused_by_name(make, message):
    base = tiny_llama()
    model = peft.get_peft_model(copy.deepcopy(base), make())
    for anchor in (None, base):
        with pytest.raises(ValueError, match=message):
            rejuvenate(model, anchor, alpha=0.5)


@pytest.mark.parametrize("loaded", [False, True], ids=["trained", "loaded for inference"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_along_need_the_base(bias, loaded, tmp_path):
    """They are in the base's place; of an adapter that was loaded they are no longer marked as trained."""
    base = tiny_llama(attention_bias=True)
    model = adapted(base, bias=bias, target_modules=["q_proj", "v_proj"])
    if loaded:
        model.save_pretrained(tmp_path / "adapter")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").requires_grad_(
            False
        )
    whole = merged(model)
    with pytest.raises(ValueError, match="trained in place"):
        rejuvenate(model, None, alpha=0.3)
    rejuvenate(whole, base, alpha=0.3)
    rejuvenate(model, base, alpha=0.3)
    _close(merged(model), whole)


def test_a_base_that_lies_under_the_adapter_itself_moves_along():
    """PEFT puts its layers into the base that it is given: that module is no anchor of what is trained in place."""
    base = tiny_llama()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    base.model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        base.model.norm.weight += 1.0
    with pytest.raises(
        ValueError, match=r"shares its memory with the model: \['base_model.model.model.norm.weight'\]"
    ):
        rejuvenate(model, base, alpha=0.5)
