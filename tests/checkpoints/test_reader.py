"""A directory of safetensors is opened whole or refused, and read without a mapping."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.reader import open_checkpoint
from tests.anchor.test_header import STATE, any_json, few
from tests.checkpoints.directories import pair


@few
@given(
    index=st.one_of(
        any_json,
        st.fixed_dictionaries(
            {"weight_map": st.dictionaries(st.sampled_from(list(STATE)), st.text(max_size=20))}
        ),
        st.fixed_dictionaries({"weight_map": st.just(dict.fromkeys(STATE, "../x.safetensors"))}),
    )
)
def test_any_index_is_read_or_refused_and_never_leads_outside(tmp_path, index):
    root = tmp_path / "model"
    root.mkdir(exist_ok=True)
    save_file(STATE, tmp_path / "x.safetensors")
    (root / "config.json").write_text("{}")
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError)):
        open_checkpoint(root)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..", ".", "", "a\\b", "x\0y"]
)
def test_an_index_that_points_outside_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="to name files beside it"):
        open_checkpoint(tmp_path)


def test_index_and_shards_that_disagree_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weights, error, message in (
        ({"a": "1.safetensors", "b": "2.safetensors"}, ValueError, "stand in two shards"),
        ({"a": "1.safetensors"}, ValueError, "that the index lacks"),
        ({"a": "2.safetensors", "b": "2.safetensors"}, ValueError, "that their shards do not hold"),
        ({"a": "3.safetensors"}, FileNotFoundError, "do not exist"),
    ):
        index.write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(error, match=message):
            open_checkpoint(tmp_path)


_fewer = settings(few, max_examples=30)  # each of them writes a checkpoint


_KEYS = (
    "model_type",
    "text_config",
    "vocab_size",
    "tie_word_embeddings",
    "quantization_config",
    "dtype",
    "rope_scaling",
)


@_fewer
@given(
    sft_config=st.dictionaries(st.sampled_from(_KEYS), any_json, max_size=4),
    base_config=st.dictionaries(st.sampled_from(_KEYS), any_json, max_size=4),
)
def test_any_config_is_taken_or_refused(tmp_path, sft_config, base_config):
    state = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    for name, content in (("base", base_config), ("sft", sft_config)):
        (tmp_path / name).mkdir(exist_ok=True)
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with contextlib.suppress(ValueError):
        rejuvenate_checkpoint(
            tmp_path / "base",
            tmp_path / "sft",
            tmp_path / "out",
            dtype="float16",
            alpha=0.5,
        )
    verify(tmp_path / "sft")


@pytest.mark.parametrize("which", ["base", "sft"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.99])
def test_a_truncated_shard_is_refused(tmp_path, which, keep):
    pair(tmp_path)
    file = sorted((tmp_path / which).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(ValueError, match="truncated"):
        rejuvenate_checkpoint(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5)
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    base, sft = pair(tmp_path)
    monkeypatch.setattr("lightning_rejuv.checkpoints.reader.os.preadv", lambda *_: 0)
    with pytest.raises(OSError, match="ended early"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", alpha=0.5)
    assert sorted(os.listdir(tmp_path)) == ["base", "sft"]
