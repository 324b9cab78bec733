"""Base and SFT model under the names of two releases, or in two layouts: both load, so they are fused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_rejuv import Reset
from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from tests.checkpoints.directories import fuse, pair, resave, tensors, write_calibration
from tests.checkpoints.families import FAMILIES, tiny
from tests.checkpoints.multimodal import MULTIMODAL, tiny_multimodal

_QUICK = ("mixtral", "gpt_oss", "qwen2_moe", "Llava", "Qwen2_5_VL", "Gemma3", "Mllama", "Qwen3VLMoe")


def save_as_in_memory(model, path):
    """As the consolidation of a sharded run does: the names and layouts of the model in memory."""
    model.save_pretrained(path)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    tied = set(model.all_tied_weights_keys)
    state = {n: t.clone().contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(state, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f in _QUICK else pytest.mark.slow)
        for f in (*sorted(FAMILIES), *sorted(MULTIMODAL))
    ],
)
def test_names_in_memory_and_names_on_the_hub_are_fused_either_way(family, tmp_path):
    build = tiny_multimodal if family in MULTIMODAL else tiny
    base, sft = build(family, 0, torch.float32), build(family, 1, torch.float32)
    for model, name in ((base, "base"), (sft, "sft")):
        model.save_pretrained(tmp_path / name)
        save_as_in_memory(model, tmp_path / f"{name}_memory")
    base_parameters = dict(base.named_parameters())
    for a, b in itertools.product(("base", "base_memory"), ("sft", "sft_memory")):
        rejuvenate_checkpoint(tmp_path / a, tmp_path / b, tmp_path / f"{a}_{b}", alpha=0.5)
        assert tensors(tmp_path / f"{a}_{b}").keys() == tensors(tmp_path / b).keys()
        loaded = dict(type(sft).from_pretrained(tmp_path / f"{a}_{b}").named_parameters())
        for name, parameter in sft.named_parameters():
            mean = (parameter.double() + base_parameters[name].double()) / 2
            assert torch.allclose(loaded[name].double(), mean, rtol=1e-6, atol=1e-7), (a, b, name)
        assert verify(tmp_path / f"{a}_{b}"), verify(tmp_path / f"{a}_{b}")


def test_the_reset_of_experts_that_are_stored_as_one_tensor(tmp_path):
    base, sft = pair(tmp_path, "mixtral", torch.float32)
    model = tiny("mixtral", 1, torch.float32)
    save_as_in_memory(model, tmp_path / "memory")
    model.save_pretrained(sft)
    for file in sft.iterdir():
        if "token" in file.name or "template" in file.name:
            (tmp_path / "memory" / file.name).write_bytes(file.read_bytes())
    for file in sft.glob("model-*"):
        file.unlink()
    options = {"alpha": 0.5, "reset": Reset(fraction=0.05, positions="entropy_gap")}
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    for name in ("sft", "memory"):
        rejuvenate_checkpoint(
            base, tmp_path / name, tmp_path / f"out_{name}", calibration=calibration, **options
        )
    one, two = (
        type(model).from_pretrained(tmp_path / f"out_{name}").state_dict() for name in ("sft", "memory")
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


WRAPPERS = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "_fsdp_wrapped_module": lambda name: (
        "_fsdp_wrapped_module." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")
    ),
    "model.module.": lambda name: name.replace("model.", "model.module.", 1),
    "policy.": lambda name: f"policy.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("sharded", [False, True])
def test_names_of_wrappers_are_written_as_names_that_load(wrapper, sharded, tmp_path):
    from transformers import AutoModelForCausalLM

    base, sft = pair(tmp_path, dtype=torch.float32)
    expected, _ = fuse(base, sft)
    rename = WRAPPERS[wrapper]
    if sharded:
        index = json.loads((sft / "model.safetensors.index.json").read_text())
        for file in sft.glob("*.safetensors"):
            state = {rename(n): t for n, t in tensors(sft).items() if index["weight_map"].get(n) == file.name}
            save_file(state, file.with_suffix(".new"), {"format": "pt"})
        for file in sft.glob("*.new"):
            file.rename(file.with_suffix(".safetensors"))
        index["weight_map"] = {rename(n): file for n, file in index["weight_map"].items()}
        (sft / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        resave(sft, lambda state: {rename(name): tensor for name, tensor in state.items()})
    out, report = fuse(base, sft)
    assert any("do not load as they are" in text for text in report.warnings)
    assert verify(out), verify(out)
    assert not verify(sft)
    want, got = tensors(expected), tensors(out)
    assert want.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_second_prefix_that_transformers_alone_reads_past_is_not_written(tmp_path):
    """A LightningModule's attribute `model` before every name: `model.model.layers…`."""
    base, sft = pair(tmp_path, dtype=torch.float32)
    want = tensors(fuse(base, sft)[0])
    resave(sft, lambda state: {f"model.{name}": tensor for name, tensor in state.items()})
    out, report = fuse(base, sft)
    assert any("(as 'model.lm_head.weight')" in text for text in report.warnings)
    assert tensors(out).keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in tensors(out).items())


def test_a_wrapped_base_is_read_as_it_is_meant(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    expected, _ = fuse(base, sft)
    for rename in WRAPPERS.values():
        plain = tensors(base)
        resave(base, lambda state, rename=rename: {rename(name): tensor for name, tensor in state.items()})
        out, report = fuse(base, sft)
        assert report.warnings == ()
        assert all(torch.equal(tensor, tensors(expected)[name]) for name, tensor in tensors(out).items())
        resave(base, lambda _, plain=plain: plain)


def test_the_reset_and_the_diagnosis_of_wrapped_names(tmp_path):
    from lightning_rejuv.checkpoints import diagnose

    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {"calibration": calibration, "reset": Reset(fraction=0.05, positions="entropy_gap")}
    expected, _ = fuse(base, sft, **options)
    before = diagnose(base, sft, calibration=calibration)
    resave(sft, lambda state: {f"module.{name}": tensor for name, tensor in state.items()})
    out, _ = fuse(base, sft, **options)
    assert all(torch.equal(tensor, tensors(expected)[name]) for name, tensor in tensors(out).items())
    assert diagnose(base, sft, calibration=calibration).behaviour == before.behaviour
