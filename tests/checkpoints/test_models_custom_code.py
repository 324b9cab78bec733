"""Checkpoints that bring code along: it is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest
import torch

import lightning_rejuv
from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.models import CustomCode, load_config, load_model, load_tokenizer, skeleton
from lightning_rejuv.checkpoints.vocabulary import token_ids
from tests.anchor.planted import Touch
from tests.checkpoints.directories import edit_config, known_pair, pair, write_calibration

FUSION = {"alpha": 0.5}


@pytest.fixture(autouse=True)
def _nothing_runs_and_nobody_is_asked(tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", ask)
    yield
    assert not (tmp_path / "RAN").exists()


def with_code(path: Path, model_type: str = "custom_x") -> None:
    """Let a checkpoint name code of its own for its config, its model, its generation and its kernels."""
    code = f"open({str(path.parent / 'RAN')!r}, 'w')\n"
    edit_config(
        path,
        model_type=model_type,
        auto_map={"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XLM"},
    )
    for name in ("configuration_x.py", "modeling_x.py", "custom_generate/generate.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(code)


def with_tokenizer_code(path: Path) -> None:
    """Let a checkpoint have no tokenizer but one of its own code."""
    (path / "tokenizer.json").unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "XTok", "auto_map": {"AutoTokenizer": ["tokenization_x.XTok", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "tokenization_x.py").write_text(f"open({str(path.parent / 'RAN')!r}, 'w')\n")


def findings(path: Path) -> dict[str, str]:
    return {finding.check: str(finding) for finding in verify(path).findings}


def test_transformers_is_called_in_one_place():
    root = Path(lightning_rejuv.__file__).parent
    calls = {
        path.relative_to(root).as_posix(): len(found)
        for path in root.rglob("*.py")
        if (found := re.findall(r"\.from_pretrained\(", path.read_text()))
    }
    assert calls == {"checkpoints/models.py": 1}


@pytest.mark.parametrize("model_type", ["custom_x", "llama"])
def test_a_model_of_custom_code(tmp_path, model_type):
    base, sft = pair(tmp_path)
    for path in (base, sft):
        with_code(path, model_type)
    rejuvenate_checkpoint(base, sft, tmp_path / "out", **FUSION)
    found = verify(tmp_path / "out")
    assert found
    if model_type == "custom_x":
        assert "not checked: custom code" in findings(sft)["architecture"]
        with pytest.raises(CustomCode, match=r"sft/config.json' names custom code"):
            load_model(sft, "cpu", torch.float32)
        with pytest.raises(ValueError, match="never run"):
            rejuvenate_checkpoint(
                base, sft, tmp_path / "b", calibration=write_calibration(tmp_path / "c.jsonl")
            )
        assert not (tmp_path / "b").exists()
    else:  # transformers has a class of that name: it is used, and it is not asked to be more
        load_model(sft, "cpu", torch.float32)


def test_tensors_that_transformers_own_class_lacks_are_no_fault_of_custom_code(tmp_path):
    _, sft = pair(tmp_path)
    with_code(sft, "llama")
    edit_config(sft, num_hidden_layers=1 + json.loads((sft / "config.json").read_text())["num_hidden_layers"])
    assert "not checked: custom code" in findings(sft)["architecture"]
    edit_config(sft, auto_map=None)
    assert "FAULT" in findings(sft)["architecture"]


def test_a_tokenizer_of_custom_code(tmp_path):
    base, sft = pair(tmp_path)
    for path in (base, sft):
        with_code(path)
        with_tokenizer_code(path)
    rejuvenate_checkpoint(base, sft, tmp_path / "out", **FUSION)
    found = findings(sft)
    assert "warning" in found["tokenizer"]
    assert "not checked: custom code" in found["tokenizer"]
    assert "unknown" in found["vocabulary"]
    assert verify(sft)
    with pytest.raises(CustomCode, match=r"sft/tokenizer_config.json' names custom code"):
        load_tokenizer(sft)
    (sft / "tokenization_x.py").write_text("# another vocabulary")
    with pytest.raises(ValueError, match=r"sft' and .*base' cannot be compared: .*tokenizer_config.json'"):
        rejuvenate_checkpoint(base, sft, tmp_path / "refused", **FUSION)
    assert not (tmp_path / "refused").exists()


def test_only_one_of_two_tokenizers_of_custom_code_is_refused(tmp_path):
    base, sft = pair(tmp_path)
    with_code(sft)
    with_code(base)
    with_tokenizer_code(sft)
    with pytest.raises(ValueError, match="cannot be compared"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", **FUSION)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_a_config_names_is_not_fetched(tmp_path, key):
    _, sft = pair(tmp_path)
    edit_config(sft, **{key: "owner/kernel"})
    assert load_config(sft)._attn_implementation != "owner/kernel"
    assert load_model(sft, "cpu", torch.float32).config._attn_implementation in ("sdpa", "eager")
    assert type(skeleton(sft)).__name__ == "LlamaForCausalLM"
    edit_config(sft, **{key: None}, experts_implementation="owner/kernel")
    load_model(sft, "cpu", torch.float32)


def test_a_config_cannot_name_another_thing_of_transformers(tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "pipeline", lambda *_: (tmp_path / "RAN").touch())
    _, sft = pair(tmp_path)
    for name in ("pipeline", "Trainer", "__doc__", "PretrainedConfig"):
        edit_config(sft, architectures=[name])
        assert type(skeleton(sft)).__name__ == "LlamaForCausalLM"


def test_pickled_weights_are_not_read(tmp_path):
    _, sft, _ = known_pair(tmp_path)
    (sft / "model.safetensors").unlink()
    torch.save(Touch(tmp_path / "RAN"), sft / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(sft, "cpu", torch.float32)


@pytest.mark.parametrize("number", ["1e999", "-1", "1" + "0" * 30, "9" * 5000, "NaN", "[" * 100_000])
def test_ids_that_are_none_are_refused_by_file(tmp_path, number):
    for text in (
        '{"model": {"vocab": {"a": %s}}}',
        '{"model": {"vocab": {}}, "added_tokens": [{"content": [], "id": %s}]}',
    ):
        (tmp_path / "tokenizer.json").write_text(text % number)
        with pytest.raises(ValueError, match=r"tokenizer.json' is not a tokenizer: .{0,600}$"):
            token_ids(tmp_path)
