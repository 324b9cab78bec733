from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from lightning_rejuv.checkpoints import (
    diagnose,
    merge_adapter,
    rejuvenate_adapter,
    rejuvenate_checkpoint,
    verify,
)
from tests.checkpoints.directories import tensors, write_tokenizer
from tests.checkpoints.families import tiny
from tests.checkpoints.test_adapter import KINDS, close, load, mean, write_adapter

peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bias of B"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_merged_out_is_the_fusion_with_the_base(kind, alpha, tmp_path):
    base, adapter = write_adapter(tmp_path, kind)
    merge_adapter(base, adapter, tmp_path / "out", alpha=alpha)
    close(load(tmp_path / "out"), mean(load(base), load(base, adapter), alpha))
    assert verify(tmp_path / "out"), verify(tmp_path / "out")


def test_an_update_with_a_bias_is_left_to_peft(tmp_path):
    base, adapter = write_adapter(tmp_path, "bias of B")
    with pytest.raises(ValueError, match="has a bias or is a transposed DoRA: merge it with PEFT"):
        merge_adapter(base, adapter, tmp_path / "out", alpha=0.3)
    assert not (tmp_path / "out").exists()


def test_merged_in_half_precision_is_rounded_once(tmp_path):
    base, adapter = write_adapter(tmp_path, "lora")
    merge_adapter(base, adapter, tmp_path / "out", alpha=0.5, dtype="bfloat16", rounding="nearest")
    expected = mean(load(base), load(base, adapter), 0.5)
    for name, tensor in tensors(tmp_path / "out").items():
        exact = expected[name]
        step = torch.finfo(torch.bfloat16).eps / 2
        assert bool(((tensor.double() - exact).abs() <= 1.01 * step * exact.abs() + 1e-7).all()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_of_another_base_is_refused(tmp_path):
    base, adapter = write_adapter(tmp_path, "lora")
    for other, message in (
        (tiny("llama", intermediate_size=20), "to have the shape"),
        (tiny("gpt2"), "to hold"),
    ):
        other.save_pretrained(tmp_path / message)
        with pytest.raises(ValueError, match=message):
            merge_adapter(tmp_path / message, adapter, tmp_path / "out")
    write_tokenizer(adapter, [f"t{i}" for i in range(60)])
    with pytest.raises(ValueError, match="beyond the base's 48 embedding rows"):
        merge_adapter(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "pattern",
    ["layers\\.1\\.self_attn\\.q_proj", "model.*q_proj", r"layers\.\d+\..*(?:q|up)_proj", "up_proj"],
)
def test_patterns_that_people_write_mean_what_they_mean_in_peft(tmp_path, pattern):
    base, adapter = write_adapter(tmp_path, "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {pattern: 11}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(base, adapter, tmp_path / "out", alpha=1.0)
    wanted = load(base, adapter)
    for name, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-5, rtol=1e-5)


def test_no_option_of_a_merge_is_ignored(tmp_path):
    base, adapter = write_adapter(tmp_path, "lora")
    half = {"dtype": "bfloat16"}
    for options, message in (
        ({"seed": 3}, r"Expected no `seed` with `rounding=\"stochastic\"` to float32"),
        ({**half, "rounding": "nearest", "seed": 3}, r"Expected no `seed` with `rounding=\"nearest\"`"),
        ({**half, "seed": "x"}, "Expected argument `seed`"),
        ({**half, "seed": True}, "Expected argument `seed`"),
        ({"rounding": "up"}, "Expected argument `rounding`"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapter(base, adapter, tmp_path / "out", **options)
    found = []
    for number, seed in enumerate((3, np.int64(3), torch.tensor(3), 4)):
        report = merge_adapter(base, adapter, tmp_path / f"out{number}", **half, seed=seed)
        assert type(report.options["seed"]) is int
        found.append(tensors(tmp_path / f"out{number}"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[0][name], found[1][name])
    assert torch.equal(found[0][name], found[2][name])
    assert not torch.equal(found[0][name], found[3][name])


def test_files_of_the_base_that_were_not_read_are_named(tmp_path):
    base, adapter = write_adapter(tmp_path, "lora")
    (base / "model-00001-of-00002.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    report = merge_adapter(base, adapter, tmp_path / "out")
    assert "'model-00001-of-00002.safetensors'" in "".join(report.warnings)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_disk_too_small_is_said_before_anything_is_written(dtype, tmp_path, monkeypatch):
    """Too small by a byte, of the dtype that is written."""
    base, adapter = write_adapter(tmp_path, "lora")
    free = sum(t.numel() for t in tensors(base).values()) * (2 if dtype else 4) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(OSError, match="GiB free"):
        merge_adapter(base, adapter, tmp_path / "out", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    free += 1
    merge_adapter(base, adapter, tmp_path / "out", dtype=dtype)


def test_an_adapter_in_the_place_of_the_base(tmp_path):
    base, adapter = write_adapter(tmp_path, "lora")
    message = "in the base .* a PEFT adapter: it can stand as the SFT model"
    with pytest.raises(FileNotFoundError, match=message):
        merge_adapter(adapter, adapter, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=message):
        rejuvenate_checkpoint(adapter, base, tmp_path / "out", alpha=0.5)


def test_a_second_rejuvenation_is_warned_of_and_a_merge_of_the_first_is_none(tmp_path):
    base, adapter = write_adapter(tmp_path, "lora")
    assert rejuvenate_adapter(adapter, tmp_path / "once").warnings == ()
    text = "is rejuvenated already (alpha 0.4"
    assert text in rejuvenate_adapter(tmp_path / "once", tmp_path / "twice").warnings[0]
    assert text in merge_adapter(base, tmp_path / "once", tmp_path / "merged twice").warnings[0]
    assert merge_adapter(base, tmp_path / "once", tmp_path / "merged", alpha=1).warnings == ()
    merged = diagnose(base, tmp_path / "merged")  # as `diagnose` asks for
    assert (merged.rejuvenated.alpha, merged.rejuvenated.sft) == (0.4, str(adapter))
    assert "do not rejuvenate it a second time" in merged.recommendation
    merge_adapter(base, adapter, tmp_path / "plain", alpha=1)
    assert diagnose(base, tmp_path / "plain").rejuvenated is None
