"""Adapters on the head or the embedding of a base that ties the two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rejuv.checkpoints import merge_adapter, rejuvenate_adapter, rejuvenate_checkpoint
from tests.checkpoints.families import tiny

peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")

APART = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def write(path, settings, move=True, family="llama"):
    base = tiny(family, dtype=torch.float32, tie_word_embeddings=True)
    base.save_pretrained(path / "base")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (move or "q_proj" in name):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path / "sft")
    return model


@pytest.mark.parametrize("kind", APART)
def test_a_head_that_is_no_longer_the_embedding_is_refused_with_the_reason(kind, tmp_path):
    write(tmp_path, APART[kind])
    with pytest.raises(ValueError, match="ties its head to its embedding but the adapter trains") as error:
        merge_adapter(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5)
    assert "tie_word_embeddings = False" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [kind for kind in APART if "head" in kind])
def test_a_head_that_is_trained_alone_is_refused_whatever_it_holds_by_now(kind, tmp_path):
    write(tmp_path, APART[kind], move=False)
    with pytest.raises(ValueError, match="ties its head to its embedding but the adapter trains the head"):
        merge_adapter(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_a_head_that_stays_the_embedding_is_fused_with_it(settings, tmp_path):
    from transformers import AutoModelForCausalLM

    model = write(tmp_path, settings)
    merge_adapter(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base_embedding = base.model.embed_tokens.weight.detach().double()
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "sft")
    inputs = torch.arange(48)
    sft_embedding = plain.base_model.model.model.embed_tokens(inputs).detach().double()
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert out.lm_head.weight is out.model.embed_tokens.weight
    assert torch.allclose(
        out.lm_head.weight.double(), (sft_embedding + base_embedding) / 2, rtol=1e-5, atol=1e-6
    )
    assert model is not None


def test_a_copy_of_the_embedding_that_peft_stores_beside_an_adapter_is_no_training_of_the_head(tmp_path):
    model = write(tmp_path, {})
    model.save_pretrained(tmp_path / "sft", save_embedding_layers=True)
    merge_adapter(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["whole head", "lora on the head"])
def test_what_the_message_says_leads_to_the_fusion(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    write(tmp_path, APART[kind])
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base_embedding = tied.get_input_embeddings().weight.detach().double()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.config.tie_word_embeddings = False
    inputs = torch.arange(12)[None]
    expected = peft.PeftModel.from_pretrained(tied, tmp_path / "sft")(inputs).logits
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "sft").merge_and_unload()
    assert torch.allclose(merged(inputs).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    rejuvenate_checkpoint(tmp_path / "base", tmp_path / "merged", tmp_path / "out", alpha=0.5)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = (merged.lm_head.weight.detach().double() + base_embedding) / 2
    assert torch.allclose(out.lm_head.weight.double(), want, rtol=1e-5, atol=1e-6)


def test_an_adapter_out_takes_the_base_of_its_head_from_the_embedding(tmp_path):
    from safetensors.torch import load_file

    model = write(tmp_path, APART["whole head"])
    rejuvenate_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base", alpha=0.25)
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    sft_head = model.base_model.model.lm_head.modules_to_save["default"].weight.detach().double()
    base_embedding = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"].double()
    assert torch.allclose(got.double(), 0.25 * sft_head + 0.75 * base_embedding, rtol=1e-5, atol=1e-6)
