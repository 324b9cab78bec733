from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import lightning_rejuv
from lightning_rejuv import Reset
from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.dialogues import read_dialogues, tokenize
from lightning_rejuv.checkpoints.disk_names import on_disk
from lightning_rejuv.checkpoints.models import load_tokenizer
from lightning_rejuv.checkpoints.pairing import pair_up
from lightning_rejuv.checkpoints.plan_on_disk import anchor_for
from lightning_rejuv.checkpoints.reader import open_checkpoint
from lightning_rejuv.report.layers import places_of
from tests.checkpoints.directories import (
    edit_config,
    pair,
    teach,
    tensors,
    write_calibration,
    write_tokenizer,
)
from tests.checkpoints.families import FAMILIES, tiny

OPTIONS = {"alpha": 0.5, "reset": Reset(fraction=0.05, positions="entropy_gap")}


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def rejuvenated_in_memory(base, sft, calibration, **options):
    """The same through the library's in-memory path, with the base as a module."""
    model = load(sft)
    tokenizer = load_tokenizer(sft)
    batches = tokenize(read_dialogues(calibration, tokenizer), tokenizer)
    report = lightning_rejuv.rejuvenate(model, load(base), batches, **{**OPTIONS, **options})
    return model, report


# Rows and columns as they are; a transposed and fused weight; fused projections; experts that are fused and
# renamed in memory only; a head and a bias under other names.
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt2", "phi3", "mixtral", "qwen3_moe", "gpt_neox", "gpt_oss"]
)
def test_the_written_model_is_what_the_library_makes_in_memory(family, tmp_path):
    base, sft = pair(tmp_path, family, torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    report = rejuvenate_checkpoint(base, sft, tmp_path / "out", calibration=calibration, **OPTIONS)
    expected, memory = rejuvenated_in_memory(base, sft, calibration)
    assert report.attribution["neurons_reset"] == memory.neurons_reset > 0
    assert report.attribution["neurons_asked"] == memory.neurons_asked
    out = dict(load(tmp_path / "out").named_parameters())
    base_parameters = dict(load(base).named_parameters())
    back = 0
    for name, parameter in expected.named_parameters():
        assert torch.equal(out[name], parameter), name
        back += int((parameter == base_parameters[name]).sum())
    assert back >= sum(report.reset.values()) > 0
    assert verify(tmp_path / "out"), verify(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rejuvenation.json").read_text())["reset"] == report.reset


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_moved_vocabulary_and_an_automatic_alpha(family, tmp_path):
    base, sft = pair(tmp_path, family, torch.float32)
    words = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    moved = sorted(words, key=lambda word: words[word] if words[word] < 6 else 100 - words[word])
    write_tokenizer(sft, moved)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    teach(sft, calibration)
    options = {**OPTIONS, "alpha": "auto", "reset": replace(OPTIONS["reset"], quantity="target_logit")}
    report = rejuvenate_checkpoint(base, sft, tmp_path / "out", calibration=calibration, **options)
    assert 0.0 < report.alpha < 1.0
    assert report.attribution["search"].alpha == report.alpha
    sft_tensors, base_tensors, out = tensors(sft), tensors(base), tensors(tmp_path / "out")
    place = {word: words[word] for word in moved}
    rows = torch.tensor([place[word] for word in moved])
    expected = torch.lerp(
        sft_tensors["lm_head.weight"], base_tensors["lm_head.weight"][rows], 1 - report.alpha
    )
    assert torch.equal(out["lm_head.weight"], expected)
    assert report.reset
    assert not (tmp_path / "out" / "scratch").exists()


def test_a_partial_reset_and_half_precision(tmp_path):
    base, sft = pair(tmp_path)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    common = {**OPTIONS, "calibration": calibration, "alpha": 0.5, "rounding": "nearest"}
    whole = rejuvenate_checkpoint(base, sft, tmp_path / "whole", **common)
    half = rejuvenate_checkpoint(
        base, sft, tmp_path / "half", **{**common, "reset": replace(common["reset"], omega=0.5)}
    )
    assert whole.reset == half.reset
    sft_tensors, base_tensors = tensors(sft), tensors(base)
    for name in whole.reset:
        fused = (sft_tensors[name].double() + base_tensors[name].double()) / 2
        a, b = tensors(tmp_path / "whole")[name], tensors(tmp_path / "half")[name]
        selected = (a == base_tensors[name]) & (a != fused.bfloat16())
        expected = ((fused + base_tensors[name].double()) / 2).bfloat16()
        assert torch.equal(b[selected], expected[selected])
        assert torch.equal(
            b[~selected & (sft_tensors[name] != base_tensors[name])],
            a[~selected & (sft_tensors[name] != base_tensors[name])],
        )


def test_the_report_says_where_neurons_were_reset_and_the_card_in_one_line(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "c.jsonl")
    report = rejuvenate_checkpoint(base, sft, tmp_path / "out", calibration=calibration, **OPTIONS)
    _, expected = rejuvenated_in_memory(base, sft, calibration)
    found = report.attribution["neurons_by_layer"]
    assert found == expected.neurons_by_layer
    assert sum(n for kinds in found.values() for n in kinds.values()) == expected.neurons_reset > 0
    line = places_of(found)
    assert f"reset in         {line}\n" in f"{report}"
    assert f"reset in         {line}\n" in f"{expected}"
    assert "    layers " in str(report)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- reset in         {line}\n" in card
    assert "- layers " not in card
    written = json.loads((tmp_path / "out" / "rejuvenation.json").read_text())
    assert written["attribution"]["neurons_by_layer"] == {str(n): kinds for n, kinds in found.items()}


def test_random_control_resets_the_same_number(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    one, other = (
        rejuvenate_checkpoint(
            base,
            sft,
            tmp_path / kind,
            calibration=calibration,
            **{**OPTIONS, "reset": replace(OPTIONS["reset"], rank_by=kind)},
        )
        for kind in ("absolute", "random")
    )
    assert one.attribution["neurons_reset"] == other.attribution["neurons_reset"]


@pytest.mark.parametrize("budget", ["share", "union"])
def test_only_a_share_of_the_neurons_is_a_number_that_was_asked_for(budget, tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    reset = Reset(0.1, positions="entropy_gap", quantity="target_logit", scope="model", budget=budget)
    report = rejuvenate_checkpoint(
        base, sft, tmp_path / "out", alpha=0.5, calibration=calibration, reset=reset
    )
    found, share = report.attribution, round(0.1 * report.attribution["neurons"])
    assert found["neurons_asked"] == (share if budget == "share" else None)
    assert (found["neurons_reset"] > share) == (budget == "union")
    assert "asked for" not in str(report)
    written = json.loads((tmp_path / "out" / "rejuvenation.json").read_text())
    assert written["attribution"]["neurons_asked"] == found["neurons_asked"]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_the_bases_own_end_is_known_in_the_sft_models_vocabulary(beside, moved, where, tmp_path):
    """Also beside an SFT model with a generation config of its own, which ends elsewhere."""
    base, sft = pair(tmp_path, dtype=torch.float32)
    words = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    for path in (base, sft):
        (path / "generation_config.json").unlink(missing_ok=True)
        edit_config(path, eos_token_id=3)
    (base / where).write_text(
        json.dumps({**json.loads((base / "config.json").read_text()), "eos_token_id": [40, 41]})
    )
    if beside:
        (sft / "generation_config.json").write_text('{"eos_token_id": 2}')
    sft_words = sorted(words, key=lambda word: words[word] if words[word] < 6 else 100 - words[word])
    if moved:
        sft_words.remove(next(word for word in sft_words if words[word] == 41))
        write_tokenizer(sft, [*sft_words, "new"])
    opened = [open_checkpoint(path) for path in (sft, base)]
    (tmp_path / "scratch").mkdir()
    anchor = anchor_for(load(sft), pair_up(*opened), torch.float32, tmp_path / "scratch")
    expected = [sft_words.index(word) for word in sft_words if words[word] == 40] if moved else [40, 41]
    assert list(anchor.end_tokens) == expected


def test_a_family_that_the_neuron_map_does_not_know_is_refused_and_nothing_is_left(tmp_path):
    base, sft = pair(tmp_path, "rwkv")
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    with pytest.raises(ValueError, match="rwkv"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", calibration=calibration, **OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "calibration.jsonl", "sft"]


def test_a_model_that_lacks_tensors_is_refused(tmp_path):
    base, sft = pair(tmp_path)
    calibration = write_calibration(tmp_path / "calibration.jsonl")
    for path in (base, sft):
        edit_config(path, attention_bias=True)
    with pytest.raises(ValueError, match="every tensor of LlamaForCausalLM"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", calibration=calibration, **OPTIONS)


_QUICK = ("llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in _QUICK else pytest.mark.slow) for f in sorted(FAMILIES)]
)
def test_masks_find_their_weights_on_disk(family, tmp_path):
    """Canary of transformers' conversion: marked weights in memory are the marked ones on disk."""
    tiny(family, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="30KB")
    model, checkpoint = load(tmp_path), open_checkpoint(tmp_path)
    before = tensors(tmp_path)
    generator = torch.Generator().manual_seed(0)
    tied = set(model.all_tied_weights_keys)
    masks = {
        name: torch.rand(p.shape, generator=generator) < 0.1
        for name, p in model.named_parameters()
        if p.dim() > 1 and name not in tied
    }
    found = on_disk(model, checkpoint, masks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter[masks[name]] = 77.0
    model.save_pretrained(tmp_path / "marked")
    for name, tensor in tensors(tmp_path / "marked").items():
        marked = (tensor == 77.0) & (before[name] != 77.0)
        rows = marked.reshape(-1, marked.shape[-1]) if marked.dim() > 1 else marked.reshape(-1, 1)
        if name in found:
            assert torch.equal(found[name].rows(0, len(rows)), rows), name
        else:
            assert not bool(marked.any()), name


def test_a_parameter_without_a_place_on_disk_is_refused_by_name(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model, checkpoint = load(tmp_path), open_checkpoint(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    del checkpoint.place[name]
    with pytest.raises(ValueError, match=name):
        on_disk(model, checkpoint, {name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool)})
