"""What is told of a model that was run: texts that a verifier gets, searches that fail, responses that never end."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rejuv.alpha.search import NoAlpha
from lightning_rejuv.checkpoints import diagnose, rejuvenate_checkpoint
from lightning_rejuv.checkpoints.dialogues import prompt_tokens, read_calibration
from lightning_rejuv.checkpoints.models import load_tokenizer
from lightning_rejuv.checkpoints.recommendation import recommend
from lightning_rejuv.verdict import Verdict
from tests.checkpoints.directories import (
    WORDS,
    known_pair,
    pair,
    resave,
    teach,
    tensors,
    write_calibration,
    write_tokenizer,
)


@pytest.fixture
def models(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    return base, sft, write_calibration(tmp_path / "c.jsonl")


def add_bos(path):
    """Have a tokenizer put its BOS before every text."""
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(content))


def write_lines(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("bos", [False, True])
def test_a_verifier_gets_the_prompt_of_a_plain_line_to_the_letter(bos, models, tmp_path):
    """In rollouts and at the alpha that was found; of messages what was rendered."""
    base, sft, _ = models
    if bos:
        add_bos(base)
        add_bos(sft)
    plain = ["w0 w1", "w2  w3", " w4 w5\n", "<s> w6", "w0 naïve"]
    chat = {"messages": [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9 w1"}]}
    lines = [{"prompt": prompt, "response": "w9 w1"} for prompt in plain]
    calibration = write_lines(tmp_path / "mixed.jsonl", *lines, chat)
    teach(sft, calibration)
    seen = []

    def right(prompt, response):
        seen.append(prompt)
        return len(seen) % 2 == 0

    diagnose(base, sft, calibration=calibration, verifier=right, compute_dtype="float32")
    expected = sorted([*plain, "<|user|> w7 w8 <|assistant|>"])
    assert len(seen) == 4 * 6 * 8 + 6
    assert sorted(set(seen[: 6 * 8])) == expected
    assert sorted(seen[4 * 6 * 8 :]) == expected


def test_texts_of_prompts_by_their_tokens(models, tmp_path):
    """The first of several texts with the same tokens; where there is no prompt, the token that stands for it."""
    tokenizer = load_tokenizer(models[1])
    lines = [("w0 w1", "w2"), ("w0  w1", "w3"), ("", "w4 w5")]
    path = write_lines(tmp_path / "c.jsonl", *({"prompt": p, "response": r} for p, r in lines))
    read = read_calibration(path, tokenizer)
    assert read.prompts == {(6, 7): "w0 w1", (10,): "w4"}
    (batch,) = read.batches
    found = [
        prompt_tokens(ids, labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert found == [(6, 7), (6, 7), (10,)]


def test_a_search_without_an_alpha_leaves_all_else_as_it_is(models, monkeypatch):
    base, sft, calibration = models
    teach(sft, calibration)
    options = {"calibration": calibration, "compute_dtype": "float32"}
    usual = diagnose(base, sft, **options, verifier=lambda prompt, response: "w2" in prompt)

    def fail(curve):
        raise NoAlpha("Pass a number for `alpha`.", curve)

    monkeypatch.setattr("lightning_rejuv.alpha.line.choose_alpha", fail)
    found = diagnose(base, sft, **options, verifier=lambda prompt, response: "w2" in prompt)
    curve = usual.behaviour.search.curve
    assert found.behaviour.support_retention == usual.behaviour.support_retention
    assert found.behaviour.support_retention == curve[0].base_samples - curve[-1].base_samples
    assert (found.behaviour.search, found.alpha) == (None, None)
    assert (found.verdict, found.reasons) == (usual.verdict, usual.reasons)
    assert found.behaviour.rollouts == usual.behaviour.rollouts


def test_what_is_likeliest_under_the_base_is_no_reason_to_say_nothing(models):
    """As of a model that is too sure to be right about what it has not seen; here base and SFT model are swapped."""
    base, sft, calibration = models
    write_tokenizer(base)
    teach(sft, calibration)
    found = diagnose(sft, base, calibration=calibration, compute_dtype="float32", verifier=lambda *_: False)
    assert found.verdict != "unknown"
    assert (found.behaviour.search, found.alpha) == (None, None)
    (doubt,) = [text for text in found.behaviour.doubts if "no alpha" in text]
    assert "likeliest under the base (" in doubt
    assert "swapped" in doubt
    for of_another_door in ("`alpha`", "`model`", "`anchor`", "--"):
        assert of_another_door not in doubt
    assert str(found).count(doubt) == 1
    with pytest.raises(ValueError, match=r"Are `model` and `anchor` swapped\? .* or a number for `alpha`"):
        rejuvenate_checkpoint(sft, base, base.parent / "out", calibration=calibration)


@pytest.mark.parametrize("swapped", [False, True])
def test_an_sft_model_that_is_less_certain_than_its_base_is_doubted(swapped, tmp_path):
    """As of swapped directories, where a point between them finds demonstrations likelier than either does."""
    base, sft, _ = known_pair(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    ids = torch.arange(8, 32).unfold(0, 2, 1)
    for _ in range(8):
        logits = model(ids).logits[:, -1].detach()
        logits[:, : len(WORDS)] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    texts = [[f"w{token - len(WORDS)}" for token in row] for row in ids.tolist()]
    calibration = write_lines(
        tmp_path / "sampled.jsonl",
        *({"prompt": " ".join(words[:2]), "response": " ".join(words[2:])} for words in texts),
    )
    state = tensors(base)
    for path, factor in ((base, 0.05), (sft, 1.5)):
        resave(path, lambda _, factor=factor: {**state, "lm_head.weight": factor * state["lm_head.weight"]})
    directories = (sft, base) if swapped else (base, sft)
    found = diagnose(*directories, calibration=calibration, compute_dtype="float32")
    options = {"calibration": calibration, "compute_dtype": "float32"}
    report = rejuvenate_checkpoint(*directories, tmp_path / "out", **options)
    for doubts in (found.behaviour.search.doubts, report.attribution["search"].doubts):
        assert any("are the two swapped" in text for text in doubts) == swapped
    assert str(found).count("are the two swapped") == swapped


@pytest.mark.parametrize("seen", [True, False])
def test_demonstrations_that_sft_was_trained_on_are_doubted(seen, models, tmp_path):
    base, sft, trained_on = models
    teach(sft, trained_on, steps=60)
    lines = trained_on.read_text().splitlines()
    unseen = [json.loads(line.replace('"w1"', '"w5"').replace(" w1", " w9")) for line in lines]
    calibration = trained_on if seen else write_lines(tmp_path / "unseen.jsonl", *unseen)
    search = rejuvenate_checkpoint(
        base, sft, tmp_path / "out", calibration=calibration, compute_dtype="float32"
    ).attribution["search"]
    assert any("was it trained on them" in doubt for doubt in search.doubts) == seen
    found = diagnose(base, sft, calibration=calibration, compute_dtype="float32")
    assert ("was it trained on them" in found.recommendation) == seen
    healthy, _ = recommend(Verdict("healthy", ()), found.behaviour, None, False)
    assert ("was it trained on them" in healthy) == seen


def test_logits_that_overflow_are_told_with_what_to_do(models):
    base, sft, calibration = models
    large = 6e4  # a weight that float16 can hold
    resave(
        sft,
        lambda state: {
            n: t * (large / t.abs().max()) if n == "lm_head.weight" else t for n, t in state.items()
        },
    )
    for run in (
        lambda: diagnose(base, sft, calibration=calibration, compute_dtype="float16"),
        lambda: rejuvenate_checkpoint(
            base, sft, sft.parent / "out", calibration=calibration, compute_dtype="float16"
        ),
    ):
        with pytest.raises(ValueError, match="do its logits overflow.* in float32 or bfloat16"):
            run()


def test_rollouts_that_never_end_are_doubted(models):
    base, sft, calibration = models
    teach(sft, calibration)
    (sft / "generation_config.json").write_text('{"eos_token_id": 5}')
    calls = itertools.count()
    found = diagnose(
        base, sft, calibration=calibration, compute_dtype="float32", verifier=lambda *_: next(calls) % 2
    )
    assert found.behaviour.rollouts.unfinished > 24
    assert f"{found.behaviour.rollouts.unfinished} of the 48 rollouts did not end" in str(found)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (5, "to be a function"),
        (lambda response: True, "to take"),
        ("json:__name__", "to be a function"),
        ("operator:neg", "to take"),
        ("no_such_module:right", "there is none of the name"),
    ],
)
def test_a_verifier_that_cannot_be_called_is_refused_before_a_file_is_opened(verifier, message):
    with pytest.raises(ValueError, match=f"Expected `verifier` .*{message}"):
        diagnose("nowhere", "nowhere", calibration="nowhere.jsonl", verifier=verifier)


def test_a_verifier_that_fails_names_prompt_and_response_and_leaves_the_random_state(models):
    base, sft, calibration = models
    teach(sft, calibration)
    before = torch.get_rng_state()
    told = []
    with pytest.raises(
        RuntimeError, match="The verifier raised ZeroDivisionError on prompt '.*' and response '"
    ):
        diagnose(
            base,
            sft,
            calibration=calibration,
            verifier=lambda prompt, response: 1 / 0,
            progress=lambda *step: told.append(step[0]),
        )
    assert torch.equal(torch.get_rng_state(), before)
    assert told[-1] == "checking responses"
