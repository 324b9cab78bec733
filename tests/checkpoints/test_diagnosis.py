from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from lightning_rejuv.alpha.search import USUAL_ALPHA
from lightning_rejuv.checkpoints import diagnose, rejuvenate_checkpoint
from lightning_rejuv.checkpoints.diagnosis import Diagnosis
from lightning_rejuv.checkpoints.recommendation import recommend, verdict_on
from lightning_rejuv.checkpoints.stream import TensorStatistics
from lightning_rejuv.verdict import judge
from tests.checkpoints.directories import (
    edit_config,
    pair,
    resave,
    teach,
    tensors,
    write_calibration,
    write_tokenizer,
)
from tests.checkpoints.families import tiny
from tests.checkpoints.test_recommendation import ROLLOUTS, behaviour
from tests.conftest import shifted


@pytest.fixture
def models(tmp_path):
    return pair(tmp_path)


def sharpen(path, scale=6.0):
    """What excessive SFT leaves: logits that have grown."""
    for file in path.glob("*.safetensors"):
        state = {n: t for n, t in tensors(path).items() if n in _held(file)}
        save_file(
            {n: t * scale if n == "lm_head.weight" else t for n, t in state.items()}, file, {"format": "pt"}
        )


def _held(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return set(f.keys())


def one_in_two():
    """A verifier of every second rollout, and of none that answers another prompt."""
    calls = itertools.count()
    return lambda *_: (call := next(calls)) % 2 == 0 and call < 6 * 8


def by_check(diagnosis):
    return {finding.check: finding for finding in diagnosis.findings}


def test_drift_from_the_files_alone(models):
    base, sft = models
    diagnosis = diagnose(base, sft)
    sft_tensors, base_tensors = tensors(sft), tensors(base)
    for name, tensor in sft_tensors.items():
        expected = float(
            (tensor.double() - base_tensors[name].double()).norm() / base_tensors[name].double().norm()
        )
        assert diagnosis.tensors[name].drift == pytest.approx(expected, rel=1e-5)
    assert (diagnosis.verdict, diagnosis.alpha, diagnosis.behaviour) == ("unknown", None, None)
    assert "Nothing is recommended without calibration data" in diagnosis.recommendation
    assert {"layer 0", "layer 1", "lm_head.weight", "model.embed_tokens.weight"} <= set(diagnosis.layers)
    written = rejuvenate_checkpoint(base, sft, sft.parent / "out", alpha=USUAL_ALPHA, rounding="nearest")
    assert diagnosis.total.rounding_shift == written.total.rounding_shift  # what it foretells is what comes
    assert json.loads(json.dumps(diagnosis.to_dict()))["verdict"] == "unknown"
    rows = str(diagnosis).partition("by layer")[2]
    for name in ("layer 0", "layer 1", "lm_head.weight"):
        assert re.search(rf"^    {name} +{diagnosis.layers[name].drift:#.3g} ", rows, flags=re.M), name
    assert (
        f"at alpha 0.4 and rounded to nearest, shifts alpha by {diagnosis.total.rounding_shift:+.3f}"
        in str(diagnosis)
    )


def test_nothing_is_loaded_without_calibration_data(models, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    diagnose(*models)


def test_the_base_itself_has_nothing_to_rejuvenate(models):
    base, _ = models
    diagnosis = diagnose(base, base)
    assert (diagnosis.verdict, diagnosis.alpha, diagnosis.total.drift) == ("unknown", None, 0.0)
    assert "nothing to rejuvenate" in diagnosis.recommendation


@pytest.mark.parametrize("added", [0, 16])
def test_rows_that_sft_added_are_weights_that_differ_from_the_base(added, tmp_path):
    base, sft = pair(tmp_path, drift=0)
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    resave(sft, lambda s: {n: torch.cat([t, t[:added]]) if n in tables else t for n, t in s.items()})
    edit_config(sft, vocab_size=48 + added)
    diagnosis = diagnose(base, sft)
    assert diagnosis.total.drift == 0.0
    assert ("No weight differs from the base" in diagnosis.recommendation) == (not added)
    assert ("Nothing is recommended without calibration data" in diagnosis.recommendation) == bool(added)


def test_settings_and_files_that_differ_from_the_base_are_findings(models):
    base, sft = models
    assert "config" not in by_check(diagnose(base, sft))
    edit_config(base, rms_norm_eps=1e-3)
    (sft / "model.fp16.safetensors").write_bytes(b"a variant")
    diagnosis = diagnose(base, sft)
    settings, files = (finding for finding in diagnosis.findings if finding.check == "config")
    assert (settings.ok, files.ok) == (None, None)
    assert "`rms_norm_eps` is 1e-06 in the SFT model and 0.001 in the base" in settings.detail
    assert "'model.fp16.safetensors'" in files.detail
    assert {settings.detail, files.detail} <= {found["detail"] for found in diagnosis.to_dict()["findings"]}
    assert settings.detail in str(diagnosis)


def test_a_sharpened_model_is_judged_as_the_monitor_judges_it(tmp_path):
    base, sft = pair(tmp_path, drift=0.01)
    calibration = write_calibration(sft.parent / "c.jsonl")
    teach(sft, calibration, steps=10)
    sure = {"calibration": calibration, "verifier": lambda prompt, _: "w2" in prompt}
    mild = diagnose(base, sft, calibration=calibration, verifier=one_in_two())
    assert (mild.verdict, mild.alpha) == ("healthy", None), str(mild)
    assert "start RL from this model" in mild.recommendation
    sharpen(sft)
    diagnosis = diagnose(base, sft, **sure)
    behaviour = diagnosis.behaviour
    assert behaviour is not None
    assert behaviour.entropy_ratio < 0.5 < mild.behaviour.entropy_ratio
    judged = judge(behaviour.measures, {"token_entropy": behaviour.entropy_base})
    assert (diagnosis.verdict, diagnosis.reasons) == (judged.level, judged.reasons)
    assert diagnosis.verdict == "over-confident"  # right or wrong by prompt alone
    assert 0.0 < diagnosis.alpha < 1.0
    assert diagnosis.alpha == behaviour.search.alpha
    assert f"alpha {behaviour.search.alpha:.3f}" in diagnosis.recommendation
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_entropies_against_the_formula(models):
    from transformers import AutoModelForCausalLM

    from lightning_rejuv.checkpoints.dialogues import read_dialogues, tokenize
    from lightning_rejuv.checkpoints.models import load_tokenizer

    base, sft = models
    calibration = write_calibration(sft.parent / "c.jsonl")
    teach(sft, calibration)
    behaviour = diagnose(base, sft, calibration=calibration).behaviour
    tokenizer = load_tokenizer(sft)
    (batch,) = tokenize(read_dialogues(calibration, tokenizer), tokenizer)
    for path, got in ((base, behaviour.entropy_base), (sft, behaviour.entropy_sft)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        where = batch["labels"][:, 1:] != -100
        log_p = logits.log_softmax(-1)[where]
        assert got == pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()), rel=1e-4)
    nll = torch.nn.functional.nll_loss(log_p, batch["labels"][:, 1:][where])  # the SFT model's, the last
    assert behaviour.nll_sft == pytest.approx(float(nll), rel=1e-4)


def test_a_verifier_judges_rollouts_of_the_sft_model(models):
    base, sft = models
    calibration = write_calibration(sft.parent / "c.jsonl")
    teach(sft, calibration)
    seen = []

    def right(prompt, response):
        seen.append((prompt, response))
        return len(seen) % 2 and len(seen) <= 6 * 8

    diagnosis = diagnose(base, sft, calibration=calibration, verifier=right)
    rollouts = diagnosis.behaviour.rollouts
    assert (rollouts.prompts, rollouts.group) == (6, 8)
    search = diagnosis.behaviour.search
    assert len(seen) == 4 * 6 * 8 + 6  # and one to each prompt at the alpha found, too few to raise it
    assert search.right == 0.0
    assert "None of 6 rollouts is right" in search.doubts[-1]
    assert "too few to tell" in search.doubts[-1]
    assert (rollouts.pass_at_1, rollouts.pass_at_8, rollouts.zero_variance_fraction) == (0.5, 1.0, 0.0)
    assert rollouts.chance_pass_at_1 == 0.0
    assert (diagnosis.verdict, diagnosis.reasons[0].measure) == ("healthy", "pass_at_8")
    assert all(prompt.startswith("<|user|>") and prompt.endswith("<|assistant|>") for prompt, _ in seen)
    assert not any("<" in response.replace("<unk>", "") for _, response in seen)
    assert "pass@1 0.50, pass@8 1.00" in str(diagnosis)
    sure = diagnose(base, sft, calibration=calibration, verifier=lambda *_: True)
    assert sure.behaviour.search.right == 1.0
    assert sure.behaviour.search.alpha == search.alpha
    few = diagnose(base, sft, calibration=calibration, verifier=lambda *_: False)
    assert few.verdict == diagnose(base, sft, calibration=calibration).verdict != "cannot start"
    assert "no rollout is right, and RL has nothing to reward, but 6 prompts are too few to tell" in str(few)
    eight = write_calibration(sft.parent / "8.jsonl", lines=8)
    hopeless = diagnose(base, sft, calibration=eight, verifier=lambda *_: False)
    assert (hopeless.verdict, hopeless.alpha) == ("cannot start", None)
    assert diagnose(base, sft, calibration=calibration).behaviour.rollouts is None
    with pytest.raises(ValueError, match="Expected `calibration` with `verifier`"):
        diagnose(base, sft, verifier=right)
    for name in ("nowhere:f", "json:nothing", "json", ":", "json:__name__"):
        with pytest.raises(ValueError, match="Expected `verifier`"):
            diagnose(base, sft, calibration=calibration, verifier=name)


def test_template_eos_and_vocabulary_are_looked_at(tmp_path):
    base, sft = pair(tmp_path)
    assert by_check(diagnose(base, sft))["chat template"].detail == "the SFT model's own"
    (sft / "chat_template.jinja").unlink()
    write_tokenizer(base)
    finding = by_check(diagnose(base, sft))["chat template"]
    assert (finding.ok, finding.detail) == (False, "lost in SFT: the base has one")
    (sft / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert "[2, 5]" in by_check(diagnose(base, sft))["end of sequence"].detail
    words = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    write_tokenizer(sft, ["<new>", *list(words)[1:]])
    assert "1 new" in by_check(diagnose(base, sft))["vocabulary"].detail


def test_what_cannot_be_compared_is_refused(models, tmp_path):
    base, sft = models
    tiny("qwen2").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`model_type`"):
        diagnose(tmp_path / "other", sft)
    shifted(tiny("llama")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter"):
        diagnose(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="`compute_dtype`"):
        diagnose(base, sft, compute_dtype="int8")


def test_what_is_wrong_with_the_calibration_is_said_before_the_weights_are_read(
    models, tmp_path, monkeypatch
):
    base, sft = models
    monkeypatch.setenv("HOME", str(tmp_path))
    write_calibration(tmp_path / "c.jsonl")
    (tmp_path / "bad.jsonl").write_text("no JSON")
    read = []

    def progress(phase, done, total):
        read.append(phase)

    for options, message in (
        ({"calibration": "~/nowhere.jsonl"}, "nowhere.jsonl"),
        ({"calibration": "~/bad.jsonl"}, "line 1"),
        ({"calibration": "~/c.jsonl", "verifier": "math:no_such"}, "no_such"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            diagnose(base, sft, progress=progress, **options)
    assert read == []
    assert diagnose(base, sft, progress=progress, calibration="~/c.jsonl").behaviour is not None
    assert list(dict.fromkeys(read)) == [
        "reading the weights",
        "loading the model",
        "comparing with the base",
        "sampling responses",
        "searching for alpha",
        "looking closer for alpha",
    ]


def test_drift_is_told_in_the_order_of_the_layers_and_fits_a_screen():
    """Thirty layers of two tensors, three layers a row; and of eight other tensors those that moved furthest."""
    tensors = {
        f"model.layers.{n}.{part}": TensorStatistics(size * (n + 1), 4.0, 10, 10, 5)
        for n in range(30)
        for part, size in (("a", 1e-4), ("b", 3e-4))
    }
    tensors |= {f"other.{n}": TensorStatistics(1e-6 * (n + 1), 1.0, 10, 10, 0) for n in range(8)}
    verdict = verdict_on(None)
    found = Diagnosis("b", "s", tensors, (), None, verdict.level, verdict.reasons, "", None)
    rows = [line.split() for line in str(found).partition("changed\n")[2].splitlines()]
    assert [row[1] for row in rows[:10]] == [f"{n}-{n + 2}" for n in range(0, 30, 3)]
    for row, first in zip(rows, range(0, 30, 3), strict=False):
        squares = sum(4e-4 * (n + 1) for n in range(first, first + 3))
        assert row[2:] == [f"{math.sqrt(squares / (6 * 4.0)):#.3g}", "50.0%"]
    assert [row[0] for row in rows[10:]] == ["other.7", "other.6", "other.5", "other.4"]


def test_json_holds_no_nan_and_the_keys_stay():
    measured = behaviour(ROLLOUTS["at risk"], 0.0, entropy=(math.nan, 0.0), retention=math.nan)
    verdict = verdict_on(measured)
    text, alpha = recommend(verdict, measured, None, unchanged=False)
    found = Diagnosis(
        "b",
        "s",
        {"w": TensorStatistics(1.0, 0.0, 4)},
        (),
        measured,
        verdict.level,
        verdict.reasons,
        text,
        alpha,
    )
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["behaviour"]["support_retention"] is None
    assert plain["behaviour"]["entropy_ratio"] is None
    assert plain["verdict"] == "cannot start"
    assert plain["behaviour"]["rollouts"]["pass_at_8"] == 0.4
    assert {
        "base",
        "sft",
        "verdict",
        "reason",
        "alpha",
        "total",
        "layers",
        "tensors",
        "findings",
    } < plain.keys()
    assert "alpha found        0.000" in str(found)
    assert "16 prompts x 8: pass@1 0.30, pass@8 0.40, 70% of the groups all right or all wrong" in str(found)


@pytest.mark.parametrize("level", ["over-confident", "healthy"])
def test_the_search_is_shown_with_each_doubt_once(level):
    doubts = ("The window is narrow.", "It was cut.")
    measured = behaviour(ROLLOUTS[level], 0.43, doubts=doubts)
    verdict = verdict_on(measured)
    text, alpha = recommend(verdict, measured, None, unchanged=False)
    shown = str(Diagnosis("b", "s", {}, (), measured, verdict.level, verdict.reasons, text, alpha))
    assert [shown.count(doubt) for doubt in doubts] == [1, 1]
    assert "alpha found        0.430  (weight of the SFT model)" in shown
    assert "found by         auto: 80% of what SFT taught and 70% of the base's support are kept" in shown
    assert "demonstrations        9      4\n" in shown
