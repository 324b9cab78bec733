"""The small rooms: patterns, vocabularies, alphas, statistics."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rejuv.checkpoints.alphas import read_alphas
from lightning_rejuv.checkpoints.pattern import pattern_of
from lightning_rejuv.checkpoints.statistics import TensorStatistics, pooled
from lightning_rejuv.checkpoints.vocabulary import row_map, token_ids
from tests.checkpoints.directories import write_tokenizer
from tests.conftest import shift_of_alpha


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(7,), (5, 6), (3, 4, 5), (2, 3, 1, 4)]),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["rows", "columns", "any", "none"]),
)
def test_a_pattern_holds_any_mask(shape, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.3
    if kind == "rows":
        mask = mask[..., :1].expand(shape) if len(shape) > 1 else mask
    elif kind == "columns":
        mask = mask.reshape(-1, shape[-1])[:1].expand(math.prod(shape[:-1]), -1).reshape(shape)
    elif kind == "none":
        mask = torch.zeros(shape, dtype=torch.bool)
    pattern = pattern_of(mask)
    rows = mask.reshape(-1, shape[-1]) if len(shape) > 1 else mask.reshape(-1, 1)
    assert torch.equal(pattern.rows(0, len(rows)), rows)
    assert torch.equal(pattern.rows(1, 3), rows[1:3])
    assert pattern.count == int(mask.sum())
    if kind == "none" or (kind == "columns" and len(shape) > 1):
        assert len(pattern.kinds) == 1


@settings(max_examples=60, deadline=None)
@given(
    sft=st.lists(st.sampled_from("abcdefgh"), unique=True),
    base=st.lists(st.sampled_from("abcdefgh"), unique=True),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_row_map_against_brute_force(sft, base, extra):
    ours, theirs = {t: i for i, t in enumerate(sft)}, {t: i for i, t in enumerate(base)}
    rows = row_map(ours, theirs, len(sft) + extra[0], len(base) + extra[1])
    for row in range(len(sft) + extra[0]):
        if row < len(sft):
            expected = theirs.get(sft[row], -1)
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


@pytest.mark.parametrize(
    "text", ["", "3", "[1]", "{", "1: 0.5", "\x00", f'"*": {"1" * 5000}'], ids=lambda t: repr(t[:8])
)
def test_a_file_that_is_no_mapping_of_patterns(tmp_path, text):
    (tmp_path / "alpha.yaml").write_text(text)
    with pytest.raises(ValueError, match="to map patterns of tensor names"):
        read_alphas(tmp_path / "alpha.yaml")
    (tmp_path / "alpha.yaml").write_text('"*.mlp.*": 0.25\n"*": 1\n')
    assert read_alphas(tmp_path / "alpha.yaml") == {"*.mlp.*": 0.25, "*": 1}


def test_statistics_of_pieces_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 8, generator=generator).bfloat16().float()
    sft = (
        torch.where(torch.rand(64, 8, generator=generator) < 0.5, base * (1 + 1 / 200), base)
        .bfloat16()
        .float()
    )
    exact = 0.3 * sft + 0.7 * base
    fused = exact.bfloat16()
    whole = TensorStatistics()
    for start in range(0, 64, 16):
        piece = slice(start, start + 16)
        one = TensorStatistics()
        one.add(sft[piece], base[piece])
        one.add_rounding(sft[piece], base[piece], exact[piece], fused[piece])
        whole = pooled([whole, one])
    assert whole.drift == pytest.approx(float((sft - base).double().norm() / base.double().norm()), rel=1e-5)
    rows = slice(None, None, 8)
    changed = sft[rows] != base[rows]
    assert whole.changed == int(changed.sum())
    shift = shift_of_alpha(*({"": t[rows]} for t in (sft, base, fused)), 0.3)
    assert whole.rounding_shift == pytest.approx(shift, rel=1e-3)
    assert shift < -0.1
    assert TensorStatistics(difference=1.0).drift == math.inf
    assert TensorStatistics().drift == TensorStatistics().rounding_shift == 0.0
