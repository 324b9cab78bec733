"""A base and an SFT model that are the same model are refused, before anything is written."""

from __future__ import annotations

import shutil

import pytest
import torch

from lightning_rejuv.checkpoints import merge_adapter, rejuvenate_adapter, rejuvenate_checkpoint
from lightning_rejuv.checkpoints.checkpoint import Reader
from tests.checkpoints.directories import fuse, pair, resave, tensors, write_tokenizer
from tests.checkpoints.families import tiny


def copy(sft, base):
    shutil.rmtree(base)
    shutil.copytree(sft, base)


def link(sft, base):
    shutil.rmtree(base)
    base.symlink_to(sft)


def hard_links(sft, base):
    shutil.rmtree(base)
    shutil.copytree(sft, base, copy_function=lambda a, b: __import__("os").link(a, b))


def other_shards(sft, base):
    copy(sft, base)
    resave(base, lambda state: state)


def other_dtype(sft, base):
    copy(sft, base)
    resave(base, lambda state: {name: tensor.float() for name, tensor in state.items()})


def other_names(sft, base):
    copy(sft, base)
    resave(base, lambda state: {f"module.{name}": tensor for name, tensor in state.items()})


@pytest.mark.parametrize("make", [copy, link, hard_links, other_shards, other_dtype, other_names])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_same_model_is_refused_in_every_form(make, alpha, tmp_path):
    base, sft = pair(tmp_path)
    make(sft, base)
    with pytest.raises(ValueError, match="in every tensor: there is nothing to pull back"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", alpha=alpha)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]


def test_the_very_directory_is_refused(tmp_path):
    _, sft = pair(tmp_path)
    with pytest.raises(ValueError, match="there is nothing to pull back"):
        rejuvenate_checkpoint(sft, sft, tmp_path / "out", alpha=0.5)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_one_weight_is_a_difference(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_rejuv.checkpoints.same._PIECE", 100)
    base, sft = pair(tmp_path)
    copy(sft, base)

    def moved(state):
        state[name].view(-1)[place] += 1
        return state

    resave(base, moved)
    out, _ = fuse(base, sft)
    assert tensors(out).keys() == tensors(sft).keys()


def test_models_that_differ_are_told_apart_by_little(tmp_path, monkeypatch):
    base, sft = pair(tmp_path)
    read = []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, name, *a: read.append(name) or original(self, name, *a))
    from lightning_rejuv.checkpoints.checkpoint import open_checkpoint
    from lightning_rejuv.checkpoints.pairing import pair_up
    from lightning_rejuv.checkpoints.same import check_differ

    pairing = pair_up(open_checkpoint(sft), open_checkpoint(base))
    read.clear()
    check_differ(pairing)
    assert len(read) == 2


@pytest.mark.parametrize("shift", [1, 0])
def test_a_vocabulary_of_another_order_is_compared_by_token(shift, tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(42))]
    write_tokenizer(base, words)
    write_tokenizer(sft, [*words[:4], *reversed(words[4:])])
    order = torch.tensor([0, 1, 2, 3, *reversed(range(4, 46)), 46, 47])
    state = tensors(base)
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    resave(sft, lambda _: {n: t[order] if n in tables else t for n, t in state.items()})
    if shift:
        resave(base, lambda s: {n: t.roll(1, 0) if n == tables[0] else t for n, t in s.items()})
        fuse(base, sft)
    else:
        with pytest.raises(ValueError, match="there is nothing to pull back"):
            fuse(base, sft)


@pytest.mark.parametrize("kind", ["lora", "embedding", "whole", "bias"])
def test_an_adapter_that_was_never_trained_is_refused(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    settings = {
        "lora": {},
        "embedding": {"target_modules": ["embed_tokens"]},
        "whole": {"modules_to_save": ["lm_head", "norm"]},
        "bias": {"bias": "all"},
    }[kind]
    base = tiny("qwen2" if kind == "bias" else "llama", dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "sft")
    for write in (
        lambda: merge_adapter(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=0.5),
        lambda: rejuvenate_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "base", alpha=0.5),
    ):
        with pytest.raises(ValueError, match="changes nothing: the SFT model equals its base"):
            write()
    assert not (tmp_path / "out").exists()
