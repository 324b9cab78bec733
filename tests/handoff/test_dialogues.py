from __future__ import annotations

import json

import pytest
import torch

from lightning_rejuv.handoff.dialogues import read_dialogues, tokenize
from lightning_rejuv.handoff.models import load_tokenizer
from tests.handoff.checkpoints import write_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def read(tmp_path, tokenizer, *lines):
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_dialogues(file, tokenizer)


def test_messages_are_rendered_with_the_models_own_template(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ]
    (batch,) = tokenize(read(tmp_path, tokenizer, {"messages": messages}), tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert batch["input_ids"][0].tolist() == whole
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "w5 w6 </s>"
    assert bool((labels[labels != -100] == batch["input_ids"][0][labels != -100]).all())


def test_plain_pairs_are_taken_as_they_are_and_end(tmp_path, tokenizer):
    dialogues = read(
        tmp_path,
        tokenizer,
        {"prompt": "w1", "response": "w2 w3"},
        "",
        {"prompt": "w1 w2 w3", "response": "w4 </s>"},
    )
    (batch,) = tokenize(dialogues, tokenizer)
    ends = tokenizer.eos_token_id
    assert batch["labels"].tolist()[0][:4] == [-100, *tokenizer.convert_tokens_to_ids(["w2", "w3"]), ends]
    assert int((batch["labels"][1] == ends).sum()) == 1
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_batches_and_lengths(tmp_path, tokenizer):
    dialogues = read(tmp_path, tokenizer, *({"prompt": "w1", "response": "w2 " * (i + 1)} for i in range(5)))
    batches = tokenize(dialogues, tokenizer, batch_size=2, max_tokens=4)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert max(batch["input_ids"].shape[1] for batch in batches) == 4
    assert all(bool((batch["labels"] != -100).any(dim=1).all()) for batch in batches)
    with pytest.raises(ValueError, match="Expected pair 1 to have a response"):
        tokenize(dialogues, tokenizer, max_tokens=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of .* to be JSON"),
        ([1], "of the form"),
        ({"prompt": "w1"}, "of the form"),
        ({"prompt": "w1", "response": 3}, "of the form"),
        ({"messages": []}, "to end with the assistant's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "to end with the assistant's"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
            "the assistant's",
        ),
        ("", "the file is empty"),
    ],
)
def test_what_is_no_dialogue_is_refused(tmp_path, tokenizer, line, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, tokenizer, line)


def test_messages_without_a_template_or_with_one_that_rewrites(tmp_path, tokenizer):
    messages = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    tokenizer.chat_template = "{% if add_generation_prompt %}A{% else %}B{% endif %}"
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        read(tmp_path, tokenizer, messages)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        read(tmp_path, tokenizer, messages)
    with pytest.raises(ValueError, match="Expected a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_rendered_prompt_gets_no_second_start_token(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    plain, rendered = read(
        tmp_path, tokenizer, {"prompt": "w1", "response": "w2"}, {"prompt": "<s> w1", "response": "w2"}
    )
    first, second = (tokenize([d], tokenizer)[0]["input_ids"] for d in (plain, rendered))
    assert torch.equal(first, second)
    assert int((first == start).sum()) == 1
