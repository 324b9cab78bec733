from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rejuv.checkpoints import (
    is_adapter,
    merge_adapter,
    rejuvenate_adapter,
)
from tests.checkpoints.directories import resave, write_tokenizer
from tests.checkpoints.families import tiny

peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")

_LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    ),
    "embedding": ("llama", {"target_modules": [*_LINEAR, "embed_tokens"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    # PEFT stores one `fan_in_fan_out` for all layers: here that of the head, beside square weights of Conv1D.
    "mixed": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj", "lm_head"]}),
    "bias": ("qwen2", {"bias": "all"}),
    "bias of B": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "whole": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "dora": ("llama", {"use_dora": True}),
}


def write_adapter(path, kind, seed=0):
    """A base in float32 and an adapter with random weights; returns the base and the merged model in float64."""
    family, settings = KINDS[kind]
    base = tiny(family, dtype=torch.float32, **({"tie_word_embeddings": False} if kind == "mixed" else {}))
    base.save_pretrained(path / "base")
    write_tokenizer(path / "base")
    usual = {"r": 4, "lora_alpha": 6, "target_modules": _LINEAR, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**{**usual, **settings})
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path / "adapter")
    write_tokenizer(path / "adapter")
    return path / "base", path / "adapter"


def load(base, adapter=None):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if adapter is not None:
        model = (
            peft.PeftModel.from_pretrained(model, adapter, torch_dtype=torch.float64)
            .double()
            .merge_and_unload()
        )
    return {name: p.detach() for name, p in model.named_parameters()}


def close(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        error = float((tensor - expected[name]).abs().max() / expected[name].abs().max())
        assert error < 1e-6, (name, error)


def mean(base, sft, alpha):
    return {name: alpha * sft[name] + (1 - alpha) * base[name] for name in base}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_adapter_out_is_the_fusion_with_the_base(kind, tmp_path):
    base, adapter = write_adapter(tmp_path, kind)
    given = base if kind in ("whole", "bias") else None
    report = rejuvenate_adapter(adapter, tmp_path / "out", base=given, alpha=0.3)
    assert report.form == "adapter"
    close(load(base, tmp_path / "out"), mean(load(base), load(base, adapter), 0.3))
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        adapter / "adapter_config.json"
    ).read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (
        adapter / "chat_template.jinja"
    ).read_bytes()
    assert is_adapter(tmp_path / "out")
    assert ("base" in report.inputs) == (given is not None)


def test_of_an_update_the_matrix_b_and_its_bias_are_scaled_and_nothing_else(tmp_path):
    _, adapter = write_adapter(tmp_path, "bias of B")
    rejuvenate_adapter(adapter, tmp_path / "out", alpha=0.3)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out"))
    assert sum(name.endswith("lora_B.bias") for name in before) == 4
    for name, tensor in after.items():
        factor = 0.3 if ".lora_B." in name else 1.0
        torch.testing.assert_close(tensor.double(), factor * before[name].double(), rtol=1e-6, atol=1e-9)


def test_tensors_that_replace_the_bases_keep_alpha_in_bfloat16(tmp_path):
    """One step from the base's: to nearest they would be the base's again."""
    base, adapter = write_adapter(tmp_path, "whole")
    resave(base, lambda state: {n: torch.ones_like(t) if "lm_head" in n else t for n, t in state.items()})
    file = adapter / "adapter_model.safetensors"
    held = {n: torch.full_like(t, 1 + 1 / 128) if "lm_head" in n else t for n, t in load_file(file).items()}
    save_file({n: t.bfloat16() for n, t in held.items()}, file)
    written = [tmp_path / name for name in ("one", "two")]
    for out in written:
        rejuvenate_adapter(adapter, out, base=base, alpha=0.3)
    one, two = (load_file(out / "adapter_model.safetensors") for out in written)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    (head,) = (tensor for name, tensor in one.items() if "lm_head" in name)
    assert set(head.flatten().tolist()) == {1.0, 1 + 1 / 128}
    share = (float(head.double().mean()) - 1) * 128
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / head.numel()) ** 0.5


def test_alpha_by_module(tmp_path):
    base, adapter = write_adapter(tmp_path, "lora")
    rejuvenate_adapter(adapter, tmp_path / "out", alpha={"*layers.0*": 0.0, "*": 1.0})
    sft_tensors, base_tensors = load(base, adapter), load(base)
    close(
        load(base, tmp_path / "out"),
        {n: base_tensors[n] if "layers.0" in n else sft_tensors[n] for n in sft_tensors},
    )


def test_what_is_no_scaled_adapter_is_refused(tmp_path):
    _, adapter = write_adapter(tmp_path, "dora")
    with pytest.raises(ValueError, match="is DoRA"):
        rejuvenate_adapter(adapter, tmp_path / "out")
    whole = tmp_path / "w"
    whole.mkdir()
    _, adapter = write_adapter(whole, "whole")
    with pytest.raises(ValueError, match=r"replaces whole tensors of the base .* pass `base`"):
        rejuvenate_adapter(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "Expected a LoRA adapter"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"lora_alpha": None}, "`lora_alpha`"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, change, message):
    base, adapter = write_adapter(tmp_path, "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        rejuvenate_adapter(adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_malformed_adapters_are_refused(tmp_path):
    _, adapter = write_adapter(tmp_path, "lora")
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    first = next(name for name in state if "lora_A" in name)
    for broken, message in (
        ({n: t for n, t in state.items() if n != first}, "Expected both"),
        ({n: t[:2] if n == first else t for n, t in state.items()}, "Expected matrices"),
        ({**state, "other.weight": torch.ones(2)}, "to begin with"),
        ({**state, "base_model.model.x.lora_other": torch.ones(2)}, "is not known"),
        ({n: t * float("nan") for n, t in state.items()}, "NaN or infinity"),
    ):
        save_file(broken, file)
        with pytest.raises(ValueError, match=message):
            rejuvenate_adapter(adapter, tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        rejuvenate_adapter(adapter, tmp_path / "out")


@pytest.mark.parametrize("alpha", ["auto", 1.5, {"*": "x"}, {"*layers*": 0.5}, {"*mpl*": 0.1, "*": 0.5}])
def test_alphas_that_do_not_fit_an_adapter(tmp_path, alpha):
    base, adapter = write_adapter(tmp_path, "embedding")
    with pytest.raises(ValueError, match="alpha"):
        rejuvenate_adapter(adapter, tmp_path / "out", alpha=alpha)
    with pytest.raises(ValueError, match="alpha"):
        merge_adapter(base, adapter, tmp_path / "out", alpha=alpha)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("patterns", [{"q_proj(": 8}, ["q_proj"]])
def test_patterns_that_are_none_are_refused(tmp_path, patterns):
    _, adapter = write_adapter(tmp_path, "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": patterns}))
    with pytest.raises(ValueError, match="`alpha_pattern` in .* to map regular expressions to numbers"):
        rejuvenate_adapter(adapter, tmp_path / "out", alpha=0.5)


def test_an_alpha_of_another_kind_of_number(tmp_path):
    _, adapter = write_adapter(tmp_path, "lora")
    for number, alpha in enumerate((Fraction(1, 4), torch.tensor(0.25), {"*": Fraction(1, 4)})):
        report = rejuvenate_adapter(adapter, tmp_path / f"out{number}", alpha=alpha)
        assert report.alpha == ({"*": 0.25} if isinstance(alpha, dict) else 0.25)
        assert (
            json.loads((tmp_path / f"out{number}" / "rejuvenation.json").read_text())["alpha"] == report.alpha
        )


SLOW = ["(a+)+$", "(a|a)*b", "(a|a)(a|a)(a|a)(a|a)", "a?a?a?a?a?", "(?=(a+))\\1b", ".*.*.*.*b", "a" * 300]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_may_match_for_ever_is_refused(tmp_path, pattern):
    _, adapter = write_adapter(tmp_path, "patterns")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {pattern: 5}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`alpha_pattern` in .* may take for ever"):
        rejuvenate_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10**400])
def test_a_scale_that_is_no_finite_number_is_refused(tmp_path, alpha):
    _, adapter = write_adapter(tmp_path, "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    with pytest.raises(ValueError, match="`lora_alpha` in .* to be a finite number"):
        rejuvenate_adapter(adapter, tmp_path / "out")


def test_an_update_of_rank_zero_is_refused(tmp_path):
    _, adapter = write_adapter(tmp_path, "lora")
    file = adapter / "adapter_model.safetensors"
    empty = {n: t[:0] if "lora_A" in n else t[:, :0] for n, t in load_file(file).items()}
    save_file({name: tensor.contiguous() for name, tensor in empty.items()}, file)
    with pytest.raises(ValueError, match=r"Expected matrices \[r, in\] and \[out, r\]"):
        rejuvenate_adapter(adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", ["lora", "embedding", "whole", "bias"])
def test_an_adapter_that_was_never_trained_is_refused(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    settings = {
        "lora": {},
        "embedding": {"target_modules": ["embed_tokens"]},
        "whole": {"modules_to_save": ["lm_head", "norm"]},
        "bias": {"bias": "all"},
    }[kind]
    base = tiny("qwen2" if kind == "bias" else "llama", dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "sft")
    for write in (
        lambda: merge_adapter(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5),
        lambda: rejuvenate_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base", alpha=0.5),
    ):
        with pytest.raises(ValueError, match="changes nothing: the SFT model equals its base"):
            write()
    assert not (tmp_path / "out").exists()
