"""A directory that carries ``rejuvenation.json``: recognised where it tells the truth, and never trusted."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

from lightning_rejuv import Refit, rejuvenate
from lightning_rejuv.checkpoints import diagnose, merge_adapter, rejuvenate_checkpoint
from lightning_rejuv.checkpoints.dialogues import read_dialogues, tokenize
from lightning_rejuv.checkpoints.models import load_tokenizer
from lightning_rejuv.checkpoints.reader import open_checkpoint
from lightning_rejuv.checkpoints.record import find_record
from tests.checkpoints.directories import edit_config, fuse, pair, write_calibration
from tests.checkpoints.families import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base, sft = pair(tmp_path_factory.mktemp("made"), drift=0.01)
    out, _ = fuse(base, sft, alpha=0.3)
    return base, sft, out


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made[2], tmp_path / "copy")
    return tmp_path / "copy"


def found(made, directory):
    return find_record(open_checkpoint(directory), open_checkpoint(made[0]))


def rewrite(directory, **changes):
    path = directory / "rejuvenation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_rejuvenated_directory_is_recognised(made):
    base, sft, out = made
    calls = itertools.count()
    calibration = write_calibration(sft.parent / "c.jsonl")
    diagnosis = diagnose(
        base, out, calibration=calibration, verifier=lambda *_: next(calls) in range(0, 48, 2)
    )
    assert diagnosis.rejuvenated.alpha == 0.3
    assert (diagnosis.rejuvenated.sft, diagnosis.rejuvenated.base) == (str(sft), str(base))
    assert (diagnosis.verdict, diagnosis.alpha) == ("healthy", None)  # the verdict is on the model as it is
    assert "rejuvenated already" in diagnosis.recommendation
    assert f"alpha 0.3, from {str(sft)!r} and its base {str(base)!r}" in str(diagnosis)
    assert json.loads(json.dumps(diagnosis.to_dict()))["rejuvenated"]["alpha"] == 0.3
    assert diagnose(base, sft).rejuvenated is None


def test_resets_and_alphas_by_name_are_told(made, copy):
    rewrite(copy, alpha={"*": 0.3}, reset={"a": 3, "b": 4})
    record, _ = found(made, copy)
    assert (record.alpha, record.resets) == ({"*": 0.3}, 7)
    assert str(record).startswith("alpha by name, 7 weights or neurons reset")


def test_other_weights_than_were_written_are_not_taken_for_rejuvenated(made, copy):
    shutil.copyfile(made[1] / "model.safetensors.index.json", copy / "model.safetensors.index.json")
    shard = next(copy.glob("model-*.safetensors"))
    shutil.copyfile(made[1] / shard.name, shard)  # trained further and saved over it
    record, (finding,) = found(made, copy)
    assert record is None
    assert finding.ok is None
    assert shard.name in finding.detail


def test_weights_in_other_files_are_not_either(made, copy):
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    tiny("llama").save_pretrained(copy)
    record, (finding,) = found(made, copy)
    assert record is None
    assert "is of other weights" in finding.detail


def test_a_merged_adapter_is_not_rejuvenated(made, copy, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = made[0]
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", alpha=1.0)
    record, (finding,) = found(made, tmp_path / "merged")
    assert record is None
    assert "merged" in finding.detail


def test_what_an_adapter_was_refitted_with_is_known_once_it_is_merged(made, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, sft, _ = made
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    tokenizer = load_tokenizer(sft)
    dialogues = read_dialogues(write_calibration(tmp_path / "c.jsonl"), tokenizer)
    report = rejuvenate(adapted, None, tokenize(dialogues, tokenizer), alpha=0.4, refit=Refit(steps=3))
    adapted.save_pretrained(tmp_path / "adapter")
    report.save(tmp_path / "adapter" / "rejuvenation.json")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", alpha=1.0)
    said = json.loads((tmp_path / "merged" / "rejuvenation.json").read_text())
    assert said["refit"] is None  # of the merge itself
    record, _ = found(made, tmp_path / "merged")
    assert (record.alpha, record.refit, record.changes_nothing) == (0.4, 3, False)
    assert "alpha 0.4, 3 steps of refit, from" in str(record)


def test_a_second_rejuvenation_is_warned_of(made, tmp_path):
    again = rejuvenate_checkpoint(made[0], made[2], tmp_path / "again", alpha=0.5)
    first = rejuvenate_checkpoint(made[0], made[1], tmp_path / "first", alpha=0.5)
    assert first.warnings == ()
    assert "rejuvenated already (alpha" in again.warnings[0]


def test_another_base_is_named(made, copy, tmp_path):
    shutil.copytree(made[0], tmp_path / "base")
    edit_config(tmp_path / "base", max_position_embeddings=77)
    record, findings = find_record(open_checkpoint(copy), open_checkpoint(tmp_path / "base"))
    assert record is not None
    assert "another base" in findings[-1].detail
    assert "config.json" in findings[-1].detail


def test_a_base_that_is_rejuvenated_itself_is_named(made):
    record, (finding,) = find_record(open_checkpoint(made[1]), open_checkpoint(made[2]))
    assert record is None
    assert "the base is rejuvenated itself" in finding.detail


def test_the_report_of_a_rejuvenation_in_memory_is_recognised(made, tmp_path):
    from tests.conftest import shifted

    base = tiny("llama")
    model = shifted(base, 0.01)
    report = rejuvenate(model, base, alpha=0.4)
    model.save_pretrained(tmp_path / "out")
    report.save(tmp_path / "out" / "rejuvenation.json")
    record, (finding,) = found(made, tmp_path / "out")
    assert (record.alpha, record.base) == (0.4, "the given module")
    assert "holds no hash of the weights" in finding.detail


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"alpha": 0.4}',
        b'{"alpha": NaN, "inputs": {"sft": {}}, "outputs": {"a": "b"}}',
        b'{"alpha": -1, "inputs": {"sft": {}}, "outputs": {"a": "b"}}',
        b'{"alpha": true, "inputs": {"sft": {}}, "outputs": {"a": "b"}}',
        b'{"alpha": "0.4", "inputs": {"sft": {}}, "outputs": {"a": "b"}}',
        b'{"alpha": {}, "inputs": {"sft": {}}, "outputs": {"a": "b"}}',
        b'{"alpha": {"*": 2}, "inputs": {"sft": {}}, "outputs": {"a": "b"}}',
        b'{"alpha": 0.4, "inputs": [], "outputs": {"a": "b"}}',
        b'{"alpha": 0.4, "inputs": {"sft": 3}, "outputs": {"a": "b"}}',
        b'{"alpha": 0.4, "inputs": {"sft": {"path": 3}}, "outputs": {"a": "b"}}',
        b'{"alpha": 0.4, "inputs": {"sft": {}, "base": 1}, "outputs": {"a": "b"}}',
        b'{"alpha": 0.4, "inputs": {"sft": {}, "base": {"sha256": [1]}}, "outputs": {"a": "b"}}',
        b'{"alpha": 0.4, "inputs": {"sft": {}}, "outputs": {"a": 1}}',
        b'{"alpha": 0.4, "inputs": {"sft": {}}, "outputs": {}}',
        b'{"alpha": 0.4, "inputs": {"sft": {}}, "outputs": {"a": "b"}, "reset": {"w": -3}}',
        b'{"alpha": 0.4, "inputs": {"sft": {}}, "outputs": {"a": "b"}, "reset": {"w": 1e9}}',
        b'{"alpha": 0.4, "drift_before": 1}',
        b'{"alpha": 0.4, "drift_before": 1, "anchor": 3}',
        b'{"alpha": 0.4, "drift_before": 1, "anchor": "b", "neurons_reset": "x"}',
        b'{"alpha": ' + b"[" * 100_000,
        b'{"alpha": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00{",
    ],
)
def test_a_foreign_or_damaged_file_is_a_finding(made, copy, content):
    (copy / "rejuvenation.json").write_bytes(content)
    record, (finding,) = found(made, copy)
    assert record is None
    assert (finding.check, finding.ok) == ("rejuvenation", None)
    assert len(finding.detail) < 1000


def test_a_file_that_cannot_be_read_is_a_finding(made, copy, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lightning_rejuv.checkpoints.record.read_json", refuse)
    record, findings = found(made, copy)
    assert record is None
    assert "cannot be read: Permission denied" in findings[0].detail


def test_what_it_says_is_cut_and_escaped(made, copy):
    said = json.loads((copy / "rejuvenation.json").read_text())
    evil = "\x1b[2J\u202e" + "x" * 100_000
    rewrite(copy, inputs={**said["inputs"], "sft": {"path": evil}})
    record, (finding,) = found(made, copy)
    assert record.sft == evil
    assert "\x1b" not in finding.detail
    assert "\u202e" not in finding.detail
    assert len(finding.detail) < 1000
    rewrite(copy, outputs={"../../\x1b" + "y" * 100_000: "0"})
    record, (finding,) = found(made, copy)
    assert record is None
    assert "\x1b" not in finding.detail
    assert len(finding.detail) < 3000
