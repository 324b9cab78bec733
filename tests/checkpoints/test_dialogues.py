from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from lightning_rejuv.anchor.config import context_length
from lightning_rejuv.checkpoints.dialogues import read_calibration, read_dialogues, tokenize
from lightning_rejuv.checkpoints.models import load_tokenizer
from tests.checkpoints.directories import write_tokenizer

TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}]


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def read(tmp_path, tokenizer, *lines):
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_dialogues(file, tokenizer)


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
    batches = tokenize(dialogues, tokenizer, batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4), (2, 6), (1, 7)]
    assert [len(batch["input_ids"]) for batch in tokenize(dialogues * 4, tokenizer)] == [8, 8, 4]


def test_long_pairs_are_whole_and_fewer_to_a_batch(tmp_path, tokenizer):
    """Nothing is cut where the model has the positions, or says of none; no batch has more tokens than 8 of 4,096."""
    lengths = [3, 4198, 4998, 9998, 9998, 33_000, 3, 4094, 4094, 4094, 4094, 4094, 4094, 4094, 4094, 4094]
    dialogues = read(tmp_path, tokenizer, *({"prompt": "w1", "response": "w2 " * n} for n in lengths))
    for context in (None, 33_002):
        batches = tokenize(dialogues, tokenizer, context=context)
        found = [n for batch in batches for n in (batch["labels"] != -100).sum(1).tolist()]
        assert found == [n + 1 for n in lengths]  # and the token that ends it
        assert [len(batch["input_ids"]) for batch in batches] == [3, 2, 1, 8, 2]
        assert all(len(b["input_ids"]) == 1 or b["input_ids"].numel() <= 8 * 4096 for b in batches)
        ends = [
            row[labels != -100][-1]
            for b in batches
            for row, labels in zip(b["input_ids"], b["labels"], strict=True)
        ]
        assert {int(end) for end in ends} == {tokenizer.eos_token_id}


def test_a_long_prompt_is_taken(tmp_path, tokenizer):
    (dialogue,) = read(tmp_path, tokenizer, {"prompt": "w1 " * 4200, "response": "w2"})
    assert tokenize([dialogue], tokenizer, context=16_384)[0]["input_ids"].shape == (1, 4202)


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


# What stands before and after a text, by a tokenizer's post-processor; each with the special tokens there are.
PROCESSORS = {
    "nothing": ([], []),
    "bos": (["<s>"], []),
    "eos": ([], ["</s>"]),
    "both": (["<s>"], ["</s>"]),
    "as BERT": (["<|user|>"], ["<|assistant|>"]),
    "two before": (["<s>", "<|user|>"], ["</s>"]),
}


def with_processor(tokenizer, before, after):
    from tokenizers.processors import TemplateProcessing

    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*before, *after}]
    text = " ".join([*before, "$A", *after])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(text, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("prompt", ["w1 w2 ", "w1 <s> w2 ", ""])
def test_prompt_and_response_are_one_text(kind, prompt, tmp_path, tokenizer):
    """What the tokenizer makes of both as one text, with one EOS: none stands between them."""
    before, after = PROCESSORS[kind]
    with_processor(tokenizer, before, after)
    (dialogue,) = read(tmp_path, tokenizer, {"prompt": prompt, "response": "w3 w4"})
    (batch,) = tokenize([dialogue], tokenizer)
    words = [*before, *prompt.split(), "w3", "w4", "</s>"]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()) == words
    labels = batch["labels"][0]
    assert tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist()) == ["w3", "w4", "</s>"]
    if after == ["</s>"]:
        assert batch["input_ids"][0].tolist() == tokenizer(f"{prompt}w3 w4")["input_ids"]


@pytest.mark.parametrize("flags", [{"add_bos_token": True}, {"add_eos_token": True}, {}])
def test_a_sentencepiece_like_tokenizer_with_flags(flags, tmp_path):
    """The response begins as in the whole text: without the space that is put before a text of its own."""
    from transformers import LlamaTokenizer

    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "ab", "▁ab", ":"]
    tokenizer = LlamaTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "ab")],
        **flags,
    )
    (dialogue,) = read(tmp_path, tokenizer, {"prompt": "a:", "response": "b a"})
    (batch,) = tokenize([dialogue], tokenizer)
    start = ["<s>"] if tokenizer("a")["input_ids"][0] == 1 else []
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert tokens == [*start, "▁a", ":", "b", "▁a", "</s>"]


@pytest.mark.parametrize(
    ("prompt", "response", "tokens"),
    [
        ("a: ", "b", ["▁a", ":", "▁", "b"]),
        ("a", "b a", ["▁a", "b", "▁a"]),
        ("a: ", " b", ["▁a", ":", "▁", "▁b"]),
        ("a:\n", "b", ["▁a", ":", "<0x0A>", "b"]),
        ("a: ", "\nb", ["▁a", ":", "▁", "<0x0A>", "b"]),
    ],
)
@pytest.mark.parametrize("bytes_known", [True, False])
def test_a_response_that_is_tokenised_alone_begins_with_no_space_of_its_own(
    bytes_known, prompt, response, tokens, tmp_path
):
    """Where a word spans both: the space that SentencePiece puts before every text would stand in the middle of it."""
    from transformers import LlamaTokenizer

    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "ab", "▁ab", ":", *["<0x0A>"] * bytes_known]
    tokenizer = LlamaTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "ab")],
    )
    (dialogue,) = read(tmp_path, tokenizer, {"prompt": prompt, "response": response})
    (batch,) = tokenize([dialogue], tokenizer)
    found = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    start = ["<s>"] if tokenizer("a")["input_ids"][0] == 1 else []
    known = set(words)
    assert found == [*start, *(token for token in tokens if token in known), "</s>"]


@pytest.mark.parametrize("end", ["</s>", "<|assistant|>", "<|assistant|>\n", "</s> \n", "w9", "w9\n"])
def test_a_turn_ends_once(end, tmp_path, tokenizer):
    """With any special token, or one of generation_config.json's EOS (w9 here), perhaps before a line break."""
    (tmp_path / "tokenizer" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.convert_tokens_to_ids("w9")]})
    )
    (dialogue,) = read(tmp_path, tokenizer, {"prompt": "w1 ", "response": f"w3 {end}"})
    assert dialogue.response == f"w3 {end}"
    (batch,) = tokenize([dialogue], tokenizer)
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()) == ["w1", "w3", end.strip()]


@pytest.mark.parametrize("end", ["<pad>", "<s>", "<unk>", "w9", "<|added|>"])
def test_what_ends_no_turn_is_ended(end, tmp_path, tokenizer):
    """Tokens that begin, fill or stand for something; a word; and an added token that is not special."""
    tokenizer.add_tokens(["<|added|>"])
    (dialogue,) = read(tmp_path, tokenizer, {"prompt": "w1 ", "response": f"w3 {end}"})
    assert dialogue.response == f"w3 {end}</s>"


def test_a_tokenizer_without_eos_takes_the_models_or_its_own_last_token(tmp_path, tokenizer):
    tokenizer.eos_token = None
    line = {"prompt": "w1 ", "response": "w3"}
    assert read(tmp_path, tokenizer, line)[0].response == "w3"
    with_processor(tokenizer, *PROCESSORS["as BERT"])
    assert read(tmp_path, tokenizer, line)[0].response == "w3<|assistant|>"
    file = tmp_path / "tokenizer" / "generation_config.json"
    file.write_text('{"eos_token_id": 2}')
    assert read(tmp_path, tokenizer, line)[0].response == "w3</s>"
    for malformed in ("{", "[]", '{"eos_token_id": [null, "x", -1, 10000]}'):
        file.write_text(malformed)
        assert read(tmp_path, tokenizer, line)[0].response == "w3<|assistant|>"


def test_a_rendered_text_gets_no_special_token_of_the_tokenizer(tmp_path, tokenizer):
    with_processor(tokenizer, ["<s>"], ["</s>"])
    prompted = "{% if add_generation_prompt %}w5 {% endif %}"
    tokenizer.chat_template = "{% for m in messages %}w5 {{ m['content'] }} {% endfor %}" + prompted
    (batch,) = tokenize(read(tmp_path, tokenizer, {"messages": TALK}), tokenizer)
    assert batch["input_ids"][0].tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)


# Python's str.splitlines() ends a line at each of these; JSON Lines does not.
@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r"])
def test_a_line_ends_at_a_line_feed_only(inside, tmp_path, tokenizer):
    file = tmp_path / "x.jsonl"
    text = json.dumps({"prompt": "w1 ? w5 ", "response": "w2"}).replace("?", inside)
    file.write_bytes(f"{text}\n{text}\r\n\n \n{text}".encode())
    assert [d.prompt for d in read_dialogues(file, tokenizer)] == [f"w1 {inside} w5 "] * 3


def test_a_byte_order_mark_and_gzip_are_read(tmp_path, tokenizer):
    text = json.dumps({"prompt": "w1", "response": "wé"}, ensure_ascii=False)
    plain, packed = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    plain.write_bytes(text.encode("utf-8-sig"))
    packed.write_bytes(gzip.compress(f"{text}\n{text}\n".encode()))
    assert read_dialogues(plain, tokenizer) == read_dialogues(packed, tokenizer)[:1]
    assert len(read_dialogues(packed, tokenizer)) == 2
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz' to be a whole gzip file"):
        read_dialogues(packed, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"prompt": "w1", "response": "w2"}\n{"prompt": "\xff"}',
            "line 2 of .* to be UTF-8 but its byte 12",
        ),
        ('{"prompt": "w1", "response": "w2"}'.encode("utf-16"), r"x\.jsonl' to be JSONL .* text in UTF-16"),
        (b"\x28\xb5\x2f\xfd1234", "Zstandard"),
        (b"PAR1....PAR1", "a Parquet file"),
        (b'[\n{"prompt": "w1", "response": "w2"}\n]', "one JSON array; write one object a line"),
        (b'[{"prompt": "w1", "response": "w2"}]', "line 1 .* of the form"),
        (b"", "the file is empty"),
        (b"[" * 100_000, "line 1 .* to be JSON"),
    ],
)
def test_files_of_another_form_are_refused_by_name(content, message, tmp_path, tokenizer):
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_dialogues(file, tokenizer)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read(pack, tokenizer):
    reading, writing = os.pipe()
    os.write(writing, pack(b'{"prompt": "w1", "response": "w2"}\n' * 3))
    os.close(writing)
    assert len(read_dialogues(Path(f"/dev/fd/{reading}"), tokenizer)) == 3
    os.close(reading)


def test_a_pair_longer_than_the_context_is_refused_by_its_line(tmp_path, tokenizer):
    rows = [{"prompt": "w1 ", "response": "w2 " * 5}, "", {"prompt": "w1 w1 ", "response": "w2 " * 5}]
    dialogues = read(tmp_path, tokenizer, *rows)
    assert tokenize(dialogues, tokenizer, context=8)[0]["input_ids"].shape == (2, 8)
    with pytest.raises(
        ValueError,
        match=r"Expected line 3 of '.*/x\.jsonl' to fit into the model's 7 positions but it has 8 tokens, 2 of the "
        "prompt and 6 of the response. Shorten it, or leave it out",
    ):
        tokenize(dialogues, tokenizer, context=7)
    messages = [{"role": "user", "content": "w1 " * 9}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(
        ValueError, match="line 1 of .* the model's 7 positions but it has 13 tokens, 11 of the prompt"
    ):
        tokenize(read(tmp_path, tokenizer, {"messages": messages}), tokenizer, context=7)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages[-1]["content"] = ""
    empty = read(tmp_path, tokenizer, "", {"messages": messages})
    with pytest.raises(
        ValueError, match="line 2 of .* to have a response but it has 9 prompt tokens and no response"
    ):
        tokenize(empty, tokenizer)
    assert context_length({"max_position_embeddings": 7}) == context_length({"n_positions": 7}) == 7
    assert context_length({"text_config": {"max_position_embeddings": 7}}) == 7
    assert context_length({}) is context_length({"max_position_embeddings": None}) is None


@pytest.mark.parametrize("more", [{}, {"response": "</s>"}])
def test_a_pair_of_one_token_is_refused_by_its_line(more, tmp_path, tokenizer):
    """A model has to be given a token to say something of the next one."""
    blank = read(
        tmp_path, tokenizer, {"prompt": "w1", "response": ""}, {"prompt": "", "response": "", **more}
    )
    with pytest.raises(
        ValueError,
        match=r"Expected line 2 of '.*' to have a token before its response, which is one token alone",
    ):
        tokenize(blank, tokenizer)
    file = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="Expected line 2 of"):
        read_calibration(file, tokenizer)


def test_a_token_that_the_model_has_no_row_for_is_refused_by_its_line(tmp_path, tokenizer):
    """As of a tokenizer that was saved with tokens beside a model that was not resized."""
    tokenizer.add_tokens(["<|added|>"])
    lines = [{"prompt": "w1 ", "response": "w2"}, {"prompt": "w1 ", "response": "w2 <|added|>"}]
    dialogues = read(tmp_path, tokenizer, *lines)
    assert tokenize(dialogues, tokenizer, vocabulary=49)[0]["input_ids"].max() == 48
    with pytest.raises(
        ValueError,
        match=r"Expected line 2 of '.*' to hold tokens of the SFT model's 48 alone but its tokenizer makes "
        r"'<\|added\|>' \(48\) of it. Save the tokenizer",
    ):
        tokenize(dialogues, tokenizer, vocabulary=48)
