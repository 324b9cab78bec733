from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from tests.checkpoints.directories import edit_config, pair, tensors


@pytest.fixture
def whole(tmp_path):
    base, sft = pair(tmp_path)
    rejuvenate_checkpoint(base, sft, tmp_path / "out", alpha=0.5)
    return tmp_path / "out"


def faults(path):
    return {finding.check for finding in verify(path).findings if finding.ok is False}


def rewrite(path, change):
    for file in sorted(path.glob("*.safetensors")):
        state = change({n: t for n, t in tensors(path).items() if n in _names(file)})
        save_file(state, file, {"format": "pt"})
    (path / "rejuvenation.json").unlink()


def _names(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return set(f.keys())


def test_a_whole_directory(whole):
    verification = verify(whole)
    assert verification, verification
    assert all(finding.ok for finding in verification.findings), verification
    assert {f["check"] for f in verification.to_dict()["findings"]} >= {
        "hashes",
        "chat template",
        "architecture",
    }


@pytest.mark.parametrize(
    ("break_it", "check"),
    [
        (lambda p: (p / "config.json").unlink(), "index and headers"),
        (lambda p: (p / "config.json").write_text("{"), "index and headers"),
        (lambda p: next(p.glob("*-00002-*")).unlink(), "index and headers"),
        (lambda p: next(p.glob("*-00002-*")).write_bytes(b"x"), "index and headers"),
        (lambda p: rewrite(p, lambda s: {n: t * float("nan") for n, t in s.items()}), "values"),
        (lambda p: edit_config(p, num_hidden_layers=3), "architecture"),
        (lambda p: edit_config(p, intermediate_size=25), "architecture"),
        (lambda p: edit_config(p, num_attention_heads=5), "architecture"),
        (lambda p: edit_config(p, tie_word_embeddings=True), "tying"),
        (lambda p: edit_config(p, vocab_size=47), "vocabulary"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda p: (p / "tokenizer_config.json").write_text('{"eos_token": "<end>"}'), "end of sequence"),
        (lambda p: (p / "generation_config.json").write_text('{"eos_token_id": 99}'), "generation config"),
        (lambda p: (p / "generation_config.json").write_text("["), "generation config"),
        (lambda p: (p / "generation_config.json").write_text('{"eos_token_id": [[2]]}'), "generation config"),
        (lambda p: (p / "tokenizer_config.json").write_text('{"eos_token": [1]}'), "end of sequence"),
        (lambda p: (p / "chat_template.jinja").write_text("{% if %}"), "chat template"),
        (lambda p: (p / "rejuvenation.json").write_text('{"outputs": {"../x": "y"}}'), "hashes"),
        (lambda p: (p / "rejuvenation.json").write_text("[]"), "hashes"),
    ],
)
def test_every_kind_of_fault_is_found(whole, break_it, check):
    break_it(whole)
    verification = verify(whole)
    assert not verification
    assert check in faults(whole), verification
    assert "FAULT" in str(verification)
    json.dumps(verification.to_dict())


def test_a_flipped_bit_is_found_by_the_hash(whole):
    file = next(whole.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert faults(whole) == {"hashes"}


def test_warnings_are_no_faults(whole):
    (whole / "generation_config.json").unlink()
    (whole / "chat_template.jinja").unlink()
    rewrite(whole, lambda state: {n: t.half() for n, t in state.items()})
    verification = verify(whole)
    assert verification
    assert {f.check for f in verification.findings if f.ok is None} == {
        "generation config",
        "chat template",
        "dtypes",
    }


def test_a_model_that_transformers_does_not_know_is_said(whole):
    edit_config(whole, model_type="own", architectures=["Own"])
    verification = verify(whole)
    assert verification
    assert "does not know this model" in str(verification)


def test_families_whose_names_differ_on_disk(tmp_path):
    from tests.checkpoints.families import tiny

    for family in ("mixtral", "gpt_neox", "gpt2", "deepseek_v3"):
        tiny(family).save_pretrained(tmp_path / family)
        assert "architecture" not in faults(tmp_path / family)
        state = tensors(tmp_path / family)
        name = next(n for n, t in state.items() if t.dim() == 2 and ".1." in n)
        del state[name]
        save_file(state, tmp_path / family / "model.safetensors", {"format": "pt"})
        assert "architecture" in faults(tmp_path / family)


def test_the_dtype_of_the_weights_beside_the_configs(whole):
    rewrite(whole, lambda state: {n: t.to(torch.float32) for n, t in state.items()})
    assert any(f.check == "dtypes" and f.ok is None for f in verify(whole).findings)


def test_an_adapter(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    from lightning_rejuv.checkpoints import rejuvenate_adapter
    from tests.checkpoints.test_adapter import write_adapter

    _, adapter = write_adapter(tmp_path, "lora")
    rejuvenate_adapter(adapter, tmp_path / "out")
    assert verify(tmp_path / "out"), verify(tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert faults(tmp_path / "out") == {"hashes"}
