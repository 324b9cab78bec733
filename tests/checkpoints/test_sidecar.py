"""Links beside the weights: what leads out of a checkpoint is named, and never copied into the output."""

from __future__ import annotations

import os
import shutil
import socket

import pytest

from lightning_rejuv.checkpoints import merge_adapter, rejuvenate_adapter, rejuvenate_checkpoint
from lightning_rejuv.checkpoints.sidecar import copy_sidecar, links_out, sidecar_files, sidecar_size
from tests.checkpoints.directories import pair

FUSION = {"alpha": 0.5}


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret.txt").write_text("the key")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("the key")
    return tmp_path / "secret.txt"


def written(out):
    return b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_links_that_lead_out_are_named_and_not_copied(tmp_path, secret):
    base, sft = pair(tmp_path)
    (sft / "notes.txt").symlink_to(secret)
    (sft / "two.txt").symlink_to("notes.txt")
    (sft / "nowhere.txt").symlink_to("gone")
    (sft / "circle.txt").symlink_to("circle.txt")
    (sft / "folder").symlink_to(tmp_path / "secrets")
    (sft / "README.md").symlink_to(secret)
    (sft / "own.txt").write_text("ours")
    (sft / "again.txt").symlink_to("own.txt")
    (sft / "runs").mkdir()
    os.mkfifo(sft / "pipe.txt")
    report = rejuvenate_checkpoint(base, sft, tmp_path / "out", **FUSION)
    (warning,) = (w for w in report.warnings if "not copied" in w)
    for name in ("notes.txt", "two.txt", "nowhere.txt", "circle.txt", "folder", "pipe.txt"):
        assert repr(name) in warning
        assert not os.path.lexists(tmp_path / "out" / name)
    for name in ("again.txt", "own.txt", "runs"):
        assert repr(name) not in warning
    assert (tmp_path / "out" / "again.txt").read_text() == "ours"
    assert not (tmp_path / "out" / "again.txt").is_symlink()
    assert b"the key" not in written(tmp_path / "out")
    assert "not copied" in (tmp_path / "out" / "rejuvenation.json").read_text()


def test_a_folder_of_templates_that_leads_out_is_not_copied(tmp_path, secret):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    assert sidecar_files(tmp_path / "sft") == []
    assert "additional_chat_templates" in links_out(tmp_path / "sft")[0]
    (tmp_path / "sft" / "additional_chat_templates").unlink()
    (tmp_path / "sft" / "additional_chat_templates").mkdir()
    (tmp_path / "sft" / "additional_chat_templates" / "a.jinja").symlink_to(secret)
    assert sidecar_files(tmp_path / "sft") == []
    assert "additional_chat_templates/a.jinja" in links_out(tmp_path / "sft")[0]


def test_sockets_are_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.json")
        assert sidecar_files(tmp_path) == []
        assert "s.json" in links_out(tmp_path)[0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_that_leads_out_is_refused_before_anything_is_written(tmp_path, name):
    base, sft = pair(tmp_path)
    (sft / name).rename(tmp_path / name)
    (sft / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"Expected {name} in .*leads out of the checkpoint"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", **FUSION)
    assert not (tmp_path / "out").exists()


def test_a_snapshot_in_the_hubs_cache_is_copied(tmp_path):
    base, sft = pair(tmp_path)
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "rev", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sft.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert sidecar_files(snapshot) == sidecar_files(sft)
    assert sidecar_size(snapshot) == sidecar_size(sft) > 0
    assert links_out(snapshot) == []
    report = rejuvenate_checkpoint(base, snapshot, tmp_path / "out", **FUSION)
    assert not any("not copied" in warning for warning in report.warnings)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (sft / "tokenizer.json").read_bytes()


def test_copying_never_overwrites_or_follows_what_is_there(tmp_path, secret):
    _, sft = pair(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(secret)
    with pytest.raises(FileExistsError):
        copy_sidecar(sft, tmp_path / "out", None)
    assert secret.read_text() == "the key"


def test_adapters(tmp_path, secret):
    from peft import LoraConfig, get_peft_model

    from tests.checkpoints.families import tiny

    base, _ = pair(tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny("llama", 0), config)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").symlink_to(secret)
    (base / "more.txt").symlink_to(secret)
    scaled = rejuvenate_adapter(tmp_path / "adapter", tmp_path / "scaled", alpha=0.5)
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", alpha=0.5)
    assert "notes.txt" in " ".join(scaled.warnings)
    assert all(name in " ".join(merged.warnings) for name in ("notes.txt", "more.txt"))
    assert b"the key" not in written(tmp_path / "scaled") + written(tmp_path / "merged")
