"""A refit from disk to disk: what is written is what the library makes in memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_rejuv
from lightning_rejuv import Refit, Reset
from lightning_rejuv.checkpoints import diagnose, rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.dialogues import read_dialogues, tokenize
from lightning_rejuv.checkpoints.models import load_tokenizer
from lightning_rejuv.checkpoints.reader import open_checkpoint
from lightning_rejuv.checkpoints.record import find_record
from lightning_rejuv.cli.main import main
from tests.checkpoints.directories import edit_config, pair, tensors, write_calibration, write_tokenizer
from tests.checkpoints.test_plan_on_disk import load, rejuvenated_in_memory

REFIT = Refit(steps=3, learning_rate=3e-3, batch_size=8)


# Rows as they are; a transposed and fused weight, a tied head; fused projections; experts that are fused and renamed
# in memory only; a head and biases under other names.
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gpt_neox", "gemma2"])
def test_the_written_model_is_what_the_library_makes_in_memory(family, tmp_path):
    base, sft = pair(tmp_path, family, torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {
        "alpha": 0.5,
        "reset": Reset(fraction=0.05, positions="entropy_gap"),
        "refit": REFIT,
        "seed": 4,
    }
    report = rejuvenate_checkpoint(base, sft, tmp_path / "out", calibration=calibration, **options)
    expected, memory = rejuvenated_in_memory(base, sft, calibration, **options)
    out = dict(load(tmp_path / "out").named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(out[name], parameter, rtol=1e-6, atol=1e-7, msg=name)
    assert report.refit.joint_before == pytest.approx(memory.refit.joint_before, rel=1e-5)
    assert report.refit.joint_after < report.refit.joint_before
    assert report.refit.weights == memory.refit.weights == sum(p.numel() for p in expected.parameters())
    assert verify(tmp_path / "out"), verify(tmp_path / "out")
    plain, _ = rejuvenated_in_memory(base, sft, calibration, **{**options, "refit": None})
    assert all(not torch.equal(out[name], parameter) for name, parameter in plain.named_parameters())


def test_tokens_that_sft_added_are_trained_with_the_others(tmp_path):
    """The base stands in a copy with the SFT model's vocabulary then, and with its own end of a response."""
    base, sft = pair(tmp_path, dtype=torch.float32)
    model = load(sft)
    model.resize_token_embeddings(50)
    for file in sft.glob("model*"):
        file.unlink()
    model.save_pretrained(sft)
    words = sorted(load_tokenizer(base).get_vocab().items(), key=lambda item: item[1])
    write_tokenizer(sft, [*(word for word, _ in words), "n1", "n2"])
    assert all((path / "generation_config.json").is_file() for path in (base, sft))
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {"alpha": 0.5, "refit": REFIT}
    rejuvenate_checkpoint(base, sft, tmp_path / "out", calibration=calibration, **options)
    in_memory = {**options, "reset": None, "resize_vocabulary": True}
    expected, _ = rejuvenated_in_memory(base, sft, calibration, **in_memory)
    out = tensors(tmp_path / "out")
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(out[name], parameter.detach(), rtol=1e-6, atol=1e-7, msg=name)
    new = model.lm_head.weight[48:]
    assert bool(
        (out["lm_head.weight"][48:] != new).all()
    )  # the base has none: it is the steps that move them


def test_half_precision_is_rounded_once_after_the_steps(tmp_path):
    base, sft = pair(tmp_path)  # in bfloat16
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {"calibration": calibration, "alpha": 0.5, "refit": REFIT}
    options["rounding"] = "nearest"
    whole = rejuvenate_checkpoint(base, sft, tmp_path / "whole", dtype="float32", **options)
    half = rejuvenate_checkpoint(base, sft, tmp_path / "half", **options)
    wide, narrow = tensors(tmp_path / "whole"), tensors(tmp_path / "half")
    assert all(torch.equal(wide[name].bfloat16(), weight) for name, weight in narrow.items())
    assert whole.refit.joint_after == half.refit.joint_after
    # What rounding did is told of what was written, to which the move belongs, in every eighth row.
    sft_tensors, base_tensors = tensors(sft), tensors(base)
    gap = line = 0.0
    for name in narrow:
        b, s, exact, rounded = (t[name].double()[::8] for t in (base_tensors, sft_tensors, wide, narrow))
        gap, line = gap + float(((b - s) * (exact - rounded)).sum()), line + float((b - s).square().sum())
    assert half.total.rounding_shift == pytest.approx(gap / line, rel=1e-3)
    assert gap != 0


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_in_bfloat16_the_reported_loss_is_that_of_the_edit_in_memory(rounding, tmp_path):
    """At the default rate, most of whose steps bfloat16 cannot hold; the edit in memory leaves what it reports."""
    base, sft = pair(tmp_path)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {"alpha": 0.4, "refit": Refit(8), "rounding": rounding}
    report = rejuvenate_checkpoint(
        base, sft, tmp_path / "out", calibration=calibration, compute_dtype="bfloat16", **options
    )
    model, tokenizer = load(sft, torch.bfloat16), load_tokenizer(sft)
    batches = tokenize(read_dialogues(calibration, tokenizer), tokenizer)
    lightning_rejuv.rejuvenate(model, load(base, torch.bfloat16), batches, **options)
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            hidden = model.model(**inputs).last_hidden_state[:, :-1].double()
            log_probs = (hidden @ model.lm_head.weight.double().t()).log_softmax(-1)
        told = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        total -= float(told[batch["labels"][:, 1:] != -100].double().sum())
    assert report.refit.demonstrations_after == pytest.approx(total / 6, rel=1e-6)
    if rounding == "stochastic":
        assert report.refit.joint_after < report.refit.joint_before - 0.01


def test_a_head_that_is_stored_beside_its_embedding_moves_with_it(tmp_path):
    base, sft = pair(tmp_path, "llama", torch.float32, tie_word_embeddings=True)
    file = next(f for f in sft.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
    held = load_file(file)
    save_file({**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    index = json.loads((sft / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = file.name
    (sft / "model.safetensors.index.json").write_text(json.dumps(index))
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {"calibration": calibration, "alpha": 1.0, "refit": REFIT}
    rejuvenate_checkpoint(base, sft, tmp_path / "out", **options)
    out = tensors(tmp_path / "out")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    assert not torch.equal(out["lm_head.weight"], held["model.embed_tokens.weight"])
    assert verify(tmp_path / "out")


def test_the_record_knows_of_it_and_a_changed_file_is_found(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {"calibration": calibration, "alpha": 1.0, "refit": REFIT}
    report = rejuvenate_checkpoint(base, sft, tmp_path / "out", **options)
    said = json.loads((tmp_path / "out" / "rejuvenation.json").read_text())
    assert said["refit"]["steps"] == 3
    assert said["refit"]["demonstrations_after"] == report.refit.demonstrations_after
    assert said["options"]["refit"] == {"steps": 3, "learning_rate": 3e-3, "batch_size": 8}
    assert "3 steps of AdamW at 0.003" in str(report)
    assert "A few steps of training followed" in (tmp_path / "out" / "README.md").read_text()
    record, _ = find_record(open_checkpoint(tmp_path / "out"), open_checkpoint(base))
    assert (record.alpha, record.refit, record.changes_nothing) == (1.0, 3, False)
    assert "alpha 1, 3 steps of refit, from" in str(record)
    assert diagnose(base, tmp_path / "out").rejuvenated.refit == 3
    assert find_record(open_checkpoint(sft), open_checkpoint(base))[0] is None


def test_samples_of_the_base_that_did_not_end_are_told_of(tmp_path):
    """With a number for alpha; of these, by the default sampler, not one ends."""
    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    options = {"calibration": calibration, "alpha": 0.4, "refit": REFIT}
    report = rejuvenate_checkpoint(base, sft, tmp_path / "out", **options)
    doubt = "6 of the base's 6 samples did not end: their beginnings were judged."
    said = json.loads((tmp_path / "out" / "rejuvenation.json").read_text())["refit"]
    assert (said["unfinished"], said["doubts"]) == (6, [doubt])
    assert "over 6 responses that the base sampled, 6 of them unfinished" in str(report)
    assert f"  doubt          {doubt}" in str(report)


def test_the_command(tmp_path, capsys):
    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    common = ["rejuvenate", "--base", str(base), "--sft", str(sft), "--calibration", str(calibration)]
    common += ["--alpha", "0.5", "--reset-fraction", "0"]
    steps = ["--refit.steps", "2", "--refit.learning-rate", "0.003"]
    assert main([*common, *steps, "--out", str(tmp_path / "out")]) == 0
    assert "2 steps of AdamW at 0.003, 12 responses each" in capsys.readouterr().out
    options = {"calibration": calibration, "alpha": 0.5, "refit": Refit(2, 3e-3)}
    rejuvenate_checkpoint(base, sft, tmp_path / "python", **options)
    by_command, by_python = tensors(tmp_path / "out"), tensors(tmp_path / "python")
    assert all(torch.equal(by_command[name], weight) for name, weight in by_python.items())
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refit.steps", "0"], "an integer of at least 1 but got 0"),
        (["--refit.steps", "2", "--refit.learning-rate", "1e30"], "finite loss in the refit"),
        (["--refit.steps", "2", "--compute-dtype", "float16"], 'with `--refit` but got "float16"'),
    ],
)
def test_what_is_refused_leaves_nothing(options, message, tmp_path, capsys):
    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    command = ["rejuvenate", "--base", str(base), "--sft", str(sft), "--calibration", str(calibration)]
    command += ["--alpha", "0.5", "--reset-fraction", "0", "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 3
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "calibration.jsonl", "sft"]


def test_without_calibration_data_or_for_an_adapter_it_is_refused(tmp_path, capsys):
    base, sft = pair(tmp_path)
    with pytest.raises(
        ValueError, match="Expected calibration data for `refit` but got none. Pass as `calibration` a JSONL"
    ):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", alpha=0.5, refit=REFIT)
    (sft / "config.json").rename(sft / "adapter_config.json")
    command = ["rejuvenate", "--sft", str(sft), "--out", str(tmp_path / "out"), "--refit.steps", "2"]
    assert main(command) == 3
    assert "Expected no `--refit` with an adapter, for which no model is run" in capsys.readouterr().err


def test_a_weight_without_a_place_on_disk_is_refused(tmp_path, monkeypatch):
    base, sft = pair(tmp_path, dtype=torch.float32)
    edit_config(sft, use_cache=True)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    monkeypatch.setattr(
        "lightning_rejuv.checkpoints.disk_names.to_disk_layout",
        lambda model, state: {f"{name}_elsewhere": tensor for name, tensor in state.items()},
    )
    options = {"calibration": calibration, "alpha": 0.5, "refit": REFIT}
    with pytest.raises(
        ValueError, match="weights that the refit trained lie in .*_elsewhere.* leave `refit` out"
    ):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
