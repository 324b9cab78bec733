"""A directory as the anchor of a model in memory: read as transformers would load it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rejuv import PlasticityMonitor, rejuvenate
from lightning_rejuv.anchor import Anchor, match
from lightning_rejuv.checkpoints import rejuvenate_checkpoint
from tests.checkpoints.families import FAMILIES, tiny
from tests.checkpoints.multimodal import MULTIMODAL, tiny_multimodal
from tests.conftest import shifted

# Experts stacked, stacked and transposed, with another root; parts of a model under other names.
_QUICK = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama", "Llava", "Qwen2_5_VL", "Mllama")


def make(family, seed):
    build = tiny_multimodal if family in MULTIMODAL else tiny
    return build(family, seed, torch.float32)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f in _QUICK else pytest.mark.slow)
        for f in (*sorted(FAMILIES), *sorted(MULTIMODAL))
    ],
)
def test_the_function_gives_what_the_command_writes(family, tmp_path):
    base, sft = make(family, 0), make(family, 1)
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    sft.save_pretrained(tmp_path / "sft")
    rejuvenate_checkpoint(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5)
    written = dict(type(sft).from_pretrained(tmp_path / "out").named_parameters())
    before, theirs = {n: p.detach().clone() for n, p in sft.named_parameters()}, dict(base.named_parameters())
    rejuvenate(sft, tmp_path / "base", alpha=0.5)
    for name, parameter in sft.named_parameters():
        assert torch.equal(parameter, written[name]), name
        mean = (before[name].double() + theirs[name].double()) / 2
        assert torch.allclose(parameter.double(), mean, rtol=1e-6, atol=1e-7), name


def test_the_monitor_takes_the_directory_of_a_mixture_of_experts(tmp_path):
    base, sft = make("mixtral", 0), make("mixtral", 1)
    base.save_pretrained(tmp_path / "base")
    monitor = PlasticityMonitor(str(tmp_path / "base"))
    measured, expected = monitor.measure(sft), PlasticityMonitor(base.state_dict()).measure(sft)
    assert measured.keys() == expected.keys()
    assert all(torch.equal(measured[key], expected[key]) for key in measured)


def test_a_tensor_is_put_together_when_it_is_asked_for(tmp_path):
    model = make("mixtral", 0)
    model.save_pretrained(tmp_path)
    anchor = Anchor.open(tmp_path)
    loaded = anchor.read_as(model)
    assert loaded.read_as(model) is loaded
    assert anchor.read_as(copy.deepcopy(model)) is loaded  # found once for an architecture
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert loaded.shape(match(model, loaded)[name]) == model.get_parameter(name).shape
    assert torch.equal(loaded.tensor(name), model.get_parameter(name))
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(again.tensor(name), model.get_parameter(name))
    plain = make("llama", 0)
    plain.save_pretrained(tmp_path / "plain")
    untouched = Anchor.open(tmp_path / "plain")
    assert untouched.read_as(plain) is untouched


def test_a_state_dict_of_names_on_disk_is_read_the_same_way(tmp_path):
    for family in ("mixtral", "Llava"):
        model = make(family, 0)
        model.save_pretrained(tmp_path / family)
        anchor = Anchor.open(load_file(tmp_path / family / "model.safetensors")).read_as(model)
        names = match(model, anchor)
        assert all(torch.equal(anchor.tensor(names[n]), p) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["mixtral", "Llava"])
def test_a_module_around_the_model_and_biases_under_adapters(family, tmp_path):
    base = make(family, 0)
    base.save_pretrained(tmp_path)
    outer = torch.nn.ModuleDict({"model": make(family, 1)})
    anchor = Anchor.open(tmp_path).read_as(outer)
    names = match(outer, anchor)
    theirs = dict(base.named_parameters())
    assert all(torch.equal(anchor.tensor(names[f"model.{n}"]), p) for n, p in theirs.items())
    peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    adapted = peft.get_peft_model(make(family, 0), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1)
    report = rejuvenate(adapted, tmp_path, alpha=0.0)
    assert report is not None
    for name, parameter in adapted.named_parameters():
        if name.endswith("bias"):
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert torch.equal(parameter, theirs[plain]), name


def rewrite(path, change):
    state = load_file(path / "model.safetensors")
    save_file(change(state) or state, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        {"model.rotary_emb.inv_freq": torch.ones(4)},
        {"model.layers.1.self_attn.masked_bias": torch.tensor(-1e4), "model.position_ids": torch.arange(3)},
        {"mtp.layers.0.weight": torch.ones(4), "mtp_emb.weight": torch.ones(2)},
    ],
)
def test_constants_of_older_releases_and_multi_token_prediction_may_stand_in_the_base(more, tmp_path):
    model = make("llama", 0)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {**state, **more})
    anchor = Anchor.open(tmp_path).read_as(model)
    names = match(model, anchor)
    assert all(torch.equal(anchor.tensor(names[n]), p) for n, p in model.named_parameters())
    rewrite(tmp_path, lambda state: {**state, "model.layers.0.extra.weight": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"tensors that the model does not have: \['model.layers.0.extra.weight'\]"
    ):
        match(model, Anchor.open(tmp_path).read_as(model))


@pytest.mark.parametrize(("said", "fits"), [(1, True), (0, False)])
def test_the_layer_after_the_last_is_for_multi_token_prediction_where_the_config_says_so(
    said, fits, tmp_path
):
    from tests.checkpoints.directories import edit_config

    model = make("deepseek_v3", 0)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=said)
    rewrite(tmp_path, lambda state: {**state, "model.layers.2.eh_proj.weight": torch.ones(2, 4)})
    anchor = Anchor.open(tmp_path).read_as(model)
    if fits:
        assert set(match(model, anchor)) == {name for name, _ in model.named_parameters()}
    else:
        with pytest.raises(ValueError, match=r"model\.layers\.2\.eh_proj"):
            match(model, anchor)


def test_an_untied_model_of_a_tied_base_takes_the_head_from_its_embedding(tmp_path):
    from tests.checkpoints.directories import edit_config

    base, sft = tiny("llama", 0, torch.float32, tie_word_embeddings=True), make("llama", 1)
    base.save_pretrained(tmp_path)
    head = sft.lm_head.weight.detach().double()
    rejuvenate(sft, tmp_path, alpha=0.5)
    expected = (head + base.model.embed_tokens.weight.double()) / 2
    assert torch.allclose(sft.lm_head.weight.double(), expected, rtol=1e-6, atol=1e-7)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"Only in the model: \['lm_head.weight'\]"):
        match(sft, Anchor.open(tmp_path).read_as(sft))


def test_what_does_not_match_says_how_to_pass_the_base(tmp_path):
    make("mixtral", 0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"with `LlamaForCausalLM\.from_pretrained`") as error:
        match(make("llama", 0), Anchor.open(tmp_path).read_as(make("llama", 0)))
    assert "LightningModule" not in str(error.value)
    with pytest.raises(ValueError, match="do not hold the same parameters") as error:
        match(make("llama", 0), Anchor.open(make("llama", 0).model))
    assert "LightningModule" not in str(error.value)


def test_a_base_in_float8_is_refused_where_its_experts_are_put_together(tmp_path):
    from tests.checkpoints.directories import resave

    model = tiny("mixtral", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    resave(
        tmp_path,
        lambda state: {n: t.to(torch.float8_e4m3fn) if "experts" in n else t for n, t in state.items()},
    )
    edited = shifted(model, 0.1)
    before = [p.clone() for p in edited.parameters()]
    with pytest.raises(ValueError, match=r"16 bits or more but got .*experts.* \(torch.float8_e4m3fn\)"):
        rejuvenate(edited, tmp_path, alpha=0.5)
    assert all(torch.equal(p, q) for p, q in zip(edited.parameters(), before, strict=True))
