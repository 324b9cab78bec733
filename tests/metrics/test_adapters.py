"""A monitor of models with adapters: against PEFT's own merged model, measured beside the base."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_rejuv.metrics import PlasticityMonitor
from tests.conftest import batch, tiny_llama
from tests.metrics.test_monitor import clone_of, floats
from tests.processes import run_in_processes

peft = pytest.importorskip("peft")

PROBE = [batch(seed=0), batch(rows=2, length=12, seed=1)]
EVERY = ["q_proj", "down_proj"]


def lora(**changes):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": EVERY, **changes})


KINDS = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "on the embedding and the head": lambda: lora(target_modules=["embed_tokens", "lm_head", "v_proj"]),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "trainable tokens": lambda: lora(trainable_token_indices={"embed_tokens": [3, 5, 7]}),
    "ia3": lambda: peft.IA3Config(target_modules=EVERY, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=3, target_modules=EVERY),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=EVERY),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


def adapted(config, base=None, seed=1, scale=0.1, **kwargs) -> nn.Module:
    """A copy of the base with adapters that have been trained: what is trainable has moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base or tiny_llama()), config, **kwargs)
    return moved(model, seed, scale)


def moved(model, seed=1, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
                )
    return model.eval()


def merged(model) -> nn.Module:
    return copy.deepcopy(model).merge_and_unload().eval()


def monitor(anchor=None, **changes) -> PlasticityMonitor:
    return PlasticityMonitor(anchor, probe=PROBE, base_samples=PROBE, **changes)


def state_of(model):
    flags = [
        (m._disable_adapters, list(m.active_adapters))
        for m in model.modules()
        if hasattr(m, "_disable_adapters")
    ]
    return (
        clone_of(model),
        flags,
        {n: p.requires_grad for n, p in model.named_parameters()},
        [m.training for m in model.modules()],
    )


def same(a, b) -> bool:
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][n], b[0][n]) for n in a[0])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_measured_as_its_merged_self_beside_the_base(kind, tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path)
    model = adapted(KINDS[kind](), base)
    reference = monitor(clone_of(base))
    expected = floats(reference.measure(merged(model)))
    assert expected["relative_drift"] > 0
    assert expected["entropy_gap"] > 0
    before = state_of(model)
    for anchor in (None, tmp_path, clone_of(base)):
        mine = monitor(anchor)
        for _ in range(2):
            assert floats(mine.measure(model)) == pytest.approx(expected, rel=2e-4, abs=2e-6)
        assert mine.reference.values == pytest.approx(reference.reference.values, rel=1e-4, nan_ok=True)
        assert mine.verdict().level == reference.verdict().level
        assert mine.layer_values()["relative_drift"] == pytest.approx(
            reference.layer_values()["relative_drift"], rel=1e-3, abs=1e-6
        )
        assert same(state_of(model), before)


def test_fresh_adapters_change_nothing():
    values = monitor().measure(adapted(lora(), scale=0.0))
    assert (
        values["relative_drift"].item()
        == values["entropy_gap"].item()
        == values["support_retention"].item()
        == 0
    )
    assert values["drift_sparsity"].item() == 1


def test_two_adapters_at_once_and_one_that_is_not_active():
    base = tiny_llama()
    model = adapted(lora(), base)
    model.add_adapter("other", lora(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    moved(model, seed=2)
    for active in (["other"], ["default", "other"], ["default"]):
        model.base_model.set_adapter(active)
        unloaded = copy.deepcopy(model).base_model.merge_and_unload(adapter_names=active).eval()
        expected = floats(monitor(clone_of(base)).measure(unloaded))
        assert floats(monitor().measure(model)) == pytest.approx(expected, rel=2e-4, abs=2e-6)


def test_adapters_without_a_model_around():
    """As transformers' ``add_adapter`` leaves them."""
    base = tiny_llama()
    model = copy.deepcopy(base)
    peft.inject_adapter_in_model(lora(), model)
    moved(model)
    expected = floats(monitor(clone_of(base)).measure(merged(peft_twin(model, base))))
    assert floats(monitor().measure(model)) == pytest.approx(expected, rel=2e-4, abs=2e-6)


def peft_twin(model, base):
    twin = adapted(lora(), base, scale=0.0)
    own = {name: p for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[name.removeprefix("base_model.model.")])
    return twin


def test_adapters_around_a_model_that_is_not_hugging_faces():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(23, 8)
            self.inner = nn.Linear(8, 8)
            self.out = nn.Linear(8, 23)

        def forward(self, input_ids, attention_mask=None):
            return self.out(torch.relu(self.inner(self.embed(input_ids))))

    torch.manual_seed(0)
    base = Net()
    model = adapted(lora(target_modules=["inner"]), base)
    expected = floats(monitor(clone_of(base), sites=None, rank_sites=None).measure(merged(model)))
    for anchor in (None, clone_of(base)):
        found = floats(monitor(anchor, sites=None, rank_sites=None).measure(model))
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-6)


@pytest.mark.parametrize("around", [torch.autocast("cpu", torch.bfloat16), torch.inference_mode()])
def test_small_updates_of_half_precision_are_not_rounded_away(around):
    base = tiny_llama(dtype=torch.bfloat16)
    model = adapted(lora(), base, scale=1e-3)
    wide = copy.deepcopy(model).double()
    expected = monitor(clone_of(base)).measure(merged(wide))["relative_drift"].item()
    with around:
        assert monitor().measure(model)["relative_drift"].item() == pytest.approx(expected, rel=1e-3)
    rounded = monitor(clone_of(base)).measure(merged(model))["relative_drift"].item()
    assert rounded != pytest.approx(expected, rel=1e-2)  # the trap is real


def test_hooks_are_not_copied_along():
    class Owner:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def hook(self, *_):
            return None

    model = adapted(lora())
    owner = Owner()
    for module in model.modules():
        module.register_forward_hook(owner.hook)
    assert monitor().measure(model)["relative_drift"].item() > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: lora(init_lora_weights="pissa"), "initialised with 'pissa', which changes the base"),
        (lambda: lora(bias="all"), "trained in place"),
    ],
)
def test_a_base_that_is_not_under_the_adapters_is_taken_from_the_anchor(config, message):
    base = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.bias.normal_(0, 0.1)
    model = adapted(config(), base)
    expected = floats(monitor(clone_of(base)).measure(merged(model)))
    assert floats(monitor(clone_of(base)).measure(model)) == pytest.approx(expected, rel=3e-4, abs=2e-6)
    with pytest.warns(UserWarning, match=message):
        alone = floats(monitor().measure(model))
    left_out = {"entropy_gap", "support_retention", "relative_drift", "drift_sparsity"}
    assert set(expected) - set(alone) == left_out
    assert alone["token_entropy"] == pytest.approx(expected["token_entropy"], rel=2e-4)


def test_merged_adapters():
    base = tiny_llama()
    model = adapted(lora(modules_to_save=["lm_head"]), base)
    expected = floats(monitor(clone_of(base)).measure(merged(model)))
    model.merge_adapter()
    before = state_of(model)
    assert floats(monitor(clone_of(base)).measure(model)) == pytest.approx(expected, rel=2e-4, abs=2e-6)
    with pytest.warns(UserWarning, match="are merged"):
        assert "entropy_gap" not in monitor().measure(model)
    assert same(state_of(model), before)


def test_adapters_that_are_switched_off_are_the_base():
    model = adapted(lora(modules_to_save=["lm_head"]))
    with model.disable_adapter():
        values = monitor().measure(model)
    assert values["entropy_gap"].item() == values["relative_drift"].item() == 0


def test_what_cannot_be_merged_is_left_out_with_a_word(monkeypatch):
    model = adapted(lora())
    expected = floats(monitor().measure(model))

    def refuse(self, *_, **__):
        raise NotImplementedError("not for this kind")

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", refuse)
    with pytest.warns(
        UserWarning, match=r"drift is left out .*q_proj' \(lora\) cannot be merged: not for this kind"
    ):
        values = floats(monitor().measure(model))
    assert values == {n: v for n, v in expected.items() if n not in ("relative_drift", "drift_sparsity")}


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
)
def test_prompts_are_refused_by_name(config):
    model = peft.get_peft_model(tiny_llama(), config())
    holder = nn.Module()
    holder.model = model
    for anchor in (None, clone_of(tiny_llama())):
        with pytest.raises(ValueError, match="such as LoRA, but got P.*_TUNING, which works outside"):
            monitor(anchor).measure(holder)


def test_drift_alone_needs_no_probe():
    model = adapted(lora())
    values = PlasticityMonitor().measure(model)
    assert values["relative_drift"].item() == pytest.approx(monitor().measure(model)["relative_drift"].item())


def test_an_anchor_that_is_the_base_in_memory_itself_is_refused():
    model = adapted(lora())
    under = {n.replace(".base_layer.", "."): p for n, p in model.model.named_parameters() if "lora_" not in n}
    with pytest.raises(ValueError, match="is the model's own memory"):
        monitor(under).measure(model)


def test_names_that_do_not_fit_are_listed_without_adapters():
    with pytest.raises(ValueError, match="do not hold the same parameters") as error:
        monitor({"weight": torch.zeros(2)}).measure(adapted(lora()))
    assert "lora" not in str(error.value)
    assert "base_layer" not in str(error.value)


def test_sharded_adapters_have_a_base_but_no_drift(tmp_path):
    model = adapted(lora())
    expected = floats(monitor().measure(model))
    left_out = ("relative_drift", "drift_sparsity")

    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.base_model.model, mesh=mesh)
        with pytest.raises(ValueError, match="Pass `anchor=None`"):
            monitor(clone_of(tiny_llama())).measure(model)
        return floats(monitor().measure(model))

    for values in run_in_processes(work, tmp_path):
        assert values == pytest.approx(
            {n: v for n, v in expected.items() if n not in left_out}, rel=1e-4, abs=1e-6
        )
