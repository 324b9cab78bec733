"""A directory of valid safetensors in which somebody left a distributed checkpoint that runs code when it is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lightning_rejuv import PlasticityCallback, PlasticityMonitor, RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.anchor import Anchor
from lightning_rejuv.checkpoints import diagnose, merge_adapter, rejuvenate_adapter, rejuvenate_checkpoint
from tests.anchor.planted import plant
from tests.callbacks.modules import Calibrated
from tests.checkpoints.directories import known_pair
from tests.conftest import batch, sharpened, tiny_llama

OPTIONS = {"alpha": 0.5}


@pytest.fixture
def base():
    return tiny_llama()


@pytest.fixture
def planted(tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    plant(tmp_path / "base", shapes, tmp_path / "RAN")
    yield tmp_path / "base"
    assert not (tmp_path / "RAN").exists()


def test_the_weights_are_those_of_the_safetensors(planted, base):
    anchor = Anchor.open(planted)
    assert all(torch.equal(anchor.tensor(name), p) for name, p in base.named_parameters())


def test_alone_in_a_directory_it_is_refused(planted):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (planted / name).unlink()
    for source in (planted, planted / ".metadata"):
        with pytest.raises(ValueError, match="Nothing in it was run"):
            Anchor.open(source)


def test_functions(planted, base):
    sft = sharpened(base)
    before = sft.lm_head.weight.detach().clone()
    rejuvenate(sft, planted, **OPTIONS)
    torch.testing.assert_close(sft.lm_head.weight, (before + base.lm_head.weight) / 2)
    rejuvenate(sharpened(base), planted, [batch()], alpha=0.5, reset=Reset(fraction=0.1))


def test_callback(planted, base, tmp_path):
    from lightning.pytorch import Trainer

    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    callback = RejuvenationCallback(planted, at_start=True, **OPTIONS)
    monitor = PlasticityCallback(PlasticityMonitor(anchor=planted))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback, monitor], **quiet
    )
    trainer.fit(Calibrated(sharpened(base), base))
    assert trainer.global_step


def test_monitor(planted, base):
    assert PlasticityMonitor(anchor=planted).measure(sharpened(base))["relative_drift"] > 0


def test_adapters(planted, base, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    rejuvenate(model, planted, **OPTIONS)
    rejuvenate_adapter(tmp_path / "adapter", tmp_path / "scaled", base=planted, alpha=0.5)
    merge_adapter(planted, tmp_path / "adapter", tmp_path / "merged", alpha=0.5)


def test_a_checkpoint_on_disk(tmp_path):
    base, sft, calibration = known_pair(tmp_path)
    for path in (base, sft):
        shapes = json.loads((path / "config.json").read_text())
        plant(path, {"model.norm.weight": (shapes["hidden_size"],)}, tmp_path / "RAN")
    rejuvenate_checkpoint(
        base, sft, tmp_path / "out", alpha=0.5, reset=Reset(fraction=0.1), calibration=calibration
    )
    diagnose(base, sft, calibration=calibration)
    assert not (tmp_path / "RAN").exists()
    assert not (tmp_path / "out" / ".metadata").exists()
    shutil.rmtree(tmp_path / "out")
    (base / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "RAN").exists()
