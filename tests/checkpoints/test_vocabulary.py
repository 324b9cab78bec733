"""Which row is which token: by brute force, with few files, and without libraries that are not needed."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rejuv.checkpoints import verify
from lightning_rejuv.checkpoints.vocabulary import _same_tokens, row_map, runs, token_ids
from tests.checkpoints.directories import edit_config, fuse, pair, resave, tensors, write_tokenizer

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]


def vocabulary(path):
    """Token strings by id, as the reference implementation of the file sees them."""
    from tokenizers import Tokenizer

    return {i: token for token, i in Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab().items()}


@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_fused_with_the_base_row_of_its_token(seed, tmp_path):
    """A new token directly before the token of the base's row 0 among them."""
    draw = random.Random(seed)
    base, sft = pair(tmp_path, dtype=torch.float32, tokenizer=False)
    old = [*_SPECIAL, *(f"w{i}" for i in range(42))]
    draw.shuffle(old)
    kept = draw.sample(old, 40)
    new = [f"new{i}" for i in range(8)]
    sft_words = draw.sample([*kept, *new], 48)
    at = sft_words.index(old[0]) if old[0] in sft_words else 0
    sft_words.insert(at, "new token") if old[0] in sft_words else sft_words.insert(0, old[0])
    sft_words = sft_words[:48] if old[0] in sft_words[:48] else [old[0], *sft_words[:47]]
    for missing in _SPECIAL:
        if missing not in sft_words:
            sft_words[
                next(
                    i for i, token in enumerate(sft_words) if token.startswith("new") and token != "new token"
                )
            ] = missing
    write_tokenizer(base, old)
    write_tokenizer(sft, sft_words)
    out, _ = fuse(base, sft, alpha=0.25)
    tokens, base_ids = vocabulary(sft), {token: i for i, token in vocabulary(base).items()}
    before, anchor, after = tensors(sft), tensors(base), tensors(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for row in range(48):
            base_row = base_ids.get(tokens[row])
            want = before[name][row].double()
            if base_row is not None:
                want = 0.25 * want + 0.75 * anchor[name][base_row].double()
            assert torch.allclose(after[name][row].double(), want, rtol=1e-6, atol=1e-7), (name, row)


def test_a_new_token_before_the_base_row_zero():
    assert list(runs(torch.tensor([-1, 0, 1, -1, -1, 0, 5, 6, 2]))) == [
        (1, 0, 2),
        (5, 0, 1),
        (6, 5, 2),
        (8, 2, 1),
    ]
    assert list(runs(torch.tensor([-1, -1]))) == []


def without_libraries(path, files):
    """A directory whose tokenizer no installed library could read."""
    (path / "tokenizer.json").unlink()
    for name, content in files.items():
        (path / name).write_bytes(content)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.model": b"\x0a\x00"},
        {"spiece.model": b"x"},
        {"own.tiktoken": b"x"},
        {"vocab.txt": b"\xff"},
    ],
)
def test_equal_tokenizers_need_no_library(files, tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    write_tokenizer(base)
    expected, _ = fuse(base, sft)
    for path in (base, sft):
        without_libraries(path, files)
    out, report = fuse(base, sft)
    assert report.vocabulary is None
    assert all(torch.equal(tensor, tensors(expected)[name]) for name, tensor in tensors(out).items())


def test_rows_that_were_added_under_equal_tokenizers_are_new(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    write_tokenizer(base)
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    resave(sft, lambda s: {n: torch.cat([t, t[:16] + 1]) if n in tables else t for n, t in s.items()})
    edit_config(sft, vocab_size=64)
    out, report = fuse(base, sft)
    assert report.vocabulary == {"shared": 48, "moved": 0, "new in the SFT model": 16}
    assert torch.equal(tensors(out)[tables[0]][48:], tensors(sft)[tables[0]][48:])


def test_a_tokenizer_that_cannot_be_read_names_directory_file_and_what_to_install(tmp_path):
    base, sft = pair(tmp_path)
    for path, content in ((base, b"\x0a\x00"), (sft, b"\x0a\x01")):
        without_libraries(path, {"tokenizer.model": content})
    with pytest.raises(
        ValueError, match=r"'tokenizer\.model' in '.*sft' .*pip install transformers sentencepiece"
    ):
        fuse(base, sft)
    assert not verify(sft)
    assert "tokenizer.model" in str(verify(sft))


def test_a_link_that_points_nowhere_is_named(tmp_path):
    base, sft = pair(tmp_path)
    (sft / "tokenizer.json").unlink()
    (sft / "tokenizer.json").symlink_to("../../blobs/0123")
    with pytest.raises(
        ValueError, match=r"'tokenizer\.json' in '.*sft' but it is a link to '\.\./\.\./blobs/0123'"
    ):
        fuse(base, sft)
    assert "0123" in str(verify(sft))


def test_added_tokens_make_two_tokenizers_of_equal_files_differ(tmp_path):
    base, sft = pair(tmp_path)
    for path in (base, sft):
        without_libraries(path, {"tokenizer.model": b"\x0a\x00"})
    assert _same_tokens(base, sft)
    (sft / "added_tokens.json").write_text(json.dumps({"<tool>": 47}))
    assert not _same_tokens(base, sft)


@pytest.mark.parametrize("family", ["Voxtral", "Qwen2Audio", "Llava", "Gemma3", "Idefics3", "Qwen2VL"])
def test_a_resized_vocabulary_of_a_model_of_several_parts(family, tmp_path):
    from tests.checkpoints.multimodal import tiny_multimodal
    from tests.conftest import shifted

    base = tiny_multimodal(family)
    sft = shifted(base, 0.05)
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    with torch.random.fork_rng():
        sft.resize_token_embeddings(51, mean_resizing=False)
    sft.save_pretrained(tmp_path / "sft")
    write_tokenizer(tmp_path / "sft", [*_SPECIAL, *(f"w{i}" for i in range(42)), "<a>", "<b>", "<c>"])
    out, report = fuse(tmp_path / "base", tmp_path / "sft")
    assert report.vocabulary == {"shared": 48, "moved": 0, "new in the SFT model": 3}
    assert verify(out), verify(out)
    got = type(sft).from_pretrained(out).get_input_embeddings().weight.detach().double()
    sft_embedding, base_embedding = (m.get_input_embeddings().weight.detach().double() for m in (sft, base))
    assert torch.allclose(got[:48], (sft_embedding[:48] + base_embedding) / 2, rtol=1e-6, atol=1e-7)
    assert torch.equal(got[48:], sft_embedding[48:])


@settings(max_examples=60, deadline=None)
@given(
    sft=st.lists(st.sampled_from("abcdefgh"), unique=True),
    base=st.lists(st.sampled_from("abcdefgh"), unique=True),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_row_map_against_brute_force(sft, base, extra):
    sft_ids, base_ids = {t: i for i, t in enumerate(sft)}, {t: i for i, t in enumerate(base)}
    rows = row_map(sft_ids, base_ids, len(sft) + extra[0], len(base) + extra[1])
    for row in range(len(sft) + extra[0]):
        if row < len(sft):
            expected = base_ids.get(sft[row], -1)
        else:
            expected = row if len(base) <= row < len(base) + extra[1] else -1
        assert rows.rows[row] == expected
    assert rows.shared + rows.new == len(rows.rows)


def test_token_ids_of_every_form(tmp_path):
    write_tokenizer(tmp_path / "fast", ["<pad>", "<s>", "</s>", "<unk>", "x"])
    ids = token_ids(tmp_path / "fast")
    assert ids is not None
    assert ids["x"] == 4
    assert ids["<|user|>"] == 5
    (tmp_path / "unigram").mkdir()
    content = {
        "model": {"vocab": [["a", -1.0], ["b", -2.0]]},
        "added_tokens": [{"content": "<new>", "id": 7}],
    }
    (tmp_path / "unigram" / "tokenizer.json").write_text(json.dumps(content))
    assert token_ids(tmp_path / "unigram") == {"a": 0, "b": 1, "<new>": 7}
    (tmp_path / "none").mkdir()
    assert token_ids(tmp_path / "none") is None
    for broken in ("[]", "{}", '{"model": {"vocab": 3}}', "{", "[" * 10_000):
        (tmp_path / "none" / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            token_ids(tmp_path / "none")
