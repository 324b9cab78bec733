"""Which tensor of the base belongs to which: vocabulary, tying, constants, names, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.reader import Reader
from tests.checkpoints.directories import edit_config, fuse, pair, resave, tensors, write_tokenizer


@pytest.fixture
def models(tmp_path):
    return pair(tmp_path)


def test_vocabulary_is_fused_by_token_string(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    old = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d"]
    new = ["<pad>", "<s>", "</s>", "<unk>", "b", "a", "<tool>", "d", "c", "e"]
    write_tokenizer(base, old, None)
    write_tokenizer(sft, new)
    with open(base / "tokenizer.json") as f:
        base_ids = {t["content"]: t["id"] for t in json.load(f)["added_tokens"]} | {
            w: i for i, w in enumerate(old)
        }
    with open(sft / "tokenizer.json") as f:
        sft_ids = {t["content"]: t["id"] for t in json.load(f)["added_tokens"]} | {
            w: i for i, w in enumerate(new)
        }

    def grown(state):
        tables = ("lm_head.weight", "model.embed_tokens.weight")
        return {n: torch.cat([t, t[:6] * 3]) if n in tables else t for n, t in state.items()}

    resave(sft, grown)
    edit_config(sft, vocab_size=54)
    out, report = fuse(base, sft, rounding="nearest")
    sft_tensors, base_tensors, fused = tensors(sft), tensors(base), tensors(out)
    token = {i: t for t, i in sft_ids.items()}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert fused[name].shape[0] == 54
        for row in range(54):
            if row in token:
                other = base_ids.get(token[row])
            else:  # padding in both, or in the SFT model alone
                other = row if row not in base_ids.values() and row < 48 else None
            expected = (
                sft_tensors[name][row]
                if other is None
                else (sft_tensors[name][row].float() + base_tensors[name][other].float()) / 2
            )
            assert torch.equal(fused[name][row], expected.bfloat16()), (name, row, token.get(row))
    assert report.vocabulary["new in the SFT model"] == 6 + len({"<tool>", "e"})
    assert report.vocabulary["moved"] >= 4
    assert verify(out), verify(out)


def test_a_resized_vocabulary_without_tokenizers_is_refused(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    resave(
        sft,
        lambda s: {
            n: t[:40] if n in ("lm_head.weight", "model.embed_tokens.weight") else t for n, t in s.items()
        },
    )
    edit_config(sft, vocab_size=40)
    with pytest.raises(ValueError, match=r"40 vocabulary rows and the base 48, but there is no tokenizer"):
        fuse(base, sft)


def test_a_tied_base_and_an_untied_sft_model(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    resave(base, lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"})
    edit_config(base, tie_word_embeddings=True)
    out, _ = fuse(base, sft, rounding="nearest")
    sft_tensors, base_tensors = tensors(sft), tensors(base)
    expected = (sft_tensors["lm_head.weight"].float() + base_tensors["model.embed_tokens.weight"].float()) / 2
    assert torch.equal(tensors(out)["lm_head.weight"], expected.bfloat16())
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(ValueError, match="ties its head to its embedding and the base does not"):
        fuse(sft, base)


def test_a_tied_model_stays_tied(tmp_path):
    base, sft = pair(tmp_path, tie_word_embeddings=True, tokenizer=False)
    out, _ = fuse(base, sft)
    assert "lm_head.weight" not in tensors(out)
    resave(sft, lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()})
    twice, _ = fuse(base, sft)
    fused = tensors(twice)
    assert torch.equal(fused["lm_head.weight"], fused["model.embed_tokens.weight"])
    assert torch.equal(fused["lm_head.weight"], tensors(out)["model.embed_tokens.weight"])
    resave(sft, lambda state: {**state, "lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="what the model is depends on who loads it"):
        fuse(base, sft)


@pytest.mark.parametrize("which", ["base", "sft"])
@pytest.mark.parametrize("said", [False, None])
def test_a_head_that_is_stored_nowhere_is_refused_and_found(which, said, models):
    from transformers import AutoModelForCausalLM

    path = dict(zip(("base", "sft"), models, strict=True))[which]
    resave(path, lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"})
    config = json.loads((path / "config.json").read_text())
    if said is None:  # what its kind does counts
        del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    with pytest.raises(ValueError, match=rf"{which}' does not tie the head .* hold no \['lm_head.weight'\]"):
        fuse(*models)
    assert not verify(path)
    assert "lm_head.weight" in str(verify(path))


def test_files_that_no_loader_reads_are_named_in_the_report(models):
    base, sft = models
    resave(base, lambda state: state)
    for number in (1, 2):
        (base / f"model-0000{number}-of-00002.safetensors").write_bytes(b"of an earlier save")
    (sft / "model.fp16.safetensors").write_bytes(b"a variant")
    _, report = fuse(base, sft)
    assert len(report.warnings) == 2
    assert "the SFT model holds weight files" in report.warnings[0]
    assert "['model.fp16.safetensors']" in report.warnings[0]
    assert "model-00002-of-00002.safetensors" in report.warnings[1]


def test_integer_and_boolean_buffers_and_old_constants_come_from_the_sft_model(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    mask, other = torch.ones(1, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    resave(sft, lambda s: {**s, "model.mask": mask, "model.ids": torch.arange(3), **old})
    resave(
        base, lambda s: {**s, "model.mask": other, "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4)}
    )
    out, _ = fuse(base, sft)
    fused = tensors(out)
    assert torch.equal(fused["model.mask"], mask)
    assert torch.equal(fused["model.ids"], torch.arange(3))
    assert torch.equal(fused["model.layers.0.self_attn.rotary_emb.inv_freq"], next(iter(old.values())))


def test_a_base_saved_without_its_head_wrapper_is_bridged(tmp_path):
    base, sft = pair(tmp_path, "gpt2", tokenizer=False)
    reference, _ = fuse(base, sft)
    resave(base, lambda s: {n.removeprefix("transformer."): t for n, t in s.items()})
    out, _ = fuse(base, sft)
    assert all(torch.equal(t, tensors(reference)[n]) for n, t in tensors(out).items())


def test_multi_token_prediction_that_training_dropped_is_left_out(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    resave(base, lambda s: {**s, "mtp.layers.0.fc.weight": torch.ones(4, 4)})
    _, report = fuse(base, sft)
    assert report.unused == ("mtp.layers.0.fc.weight",)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda b, s: edit_config(b, model_type="qwen2"), "`model_type` in config.json"),
        (lambda b, s: edit_config(b, num_attention_heads=8), "`num_attention_heads`"),
        (lambda b, s: edit_config(b, hidden_act="gelu"), "`hidden_act`"),
        (lambda b, s: edit_config(s, quantization_config={"quant_method": "gptq"}), "full-precision weights"),
        (
            lambda b, s: resave(s, lambda t: {**t, "a.qweight": torch.ones(2, dtype=torch.int32)}),
            "full-precision",
        ),
        (
            lambda b, s: resave(b, lambda t: {**t, "extra.weight": torch.ones(2)}),
            "'extra.weight' that the SFT",
        ),
        (
            lambda b, s: resave(s, lambda t: {**t, "v_head.weight": torch.ones(2)}),
            "do not hold the same tensors",
        ),
        (
            lambda b, s: resave(b, lambda t: {n: x.mT if "down" in n else x for n, x in t.items()}),
            "to have shape",
        ),
        (
            lambda b, s: resave(
                s, lambda t: {n: x * float("nan") if "o_proj" in n else x for n, x in t.items()}
            ),
            "sft'",
        ),
        (
            lambda b, s: resave(
                b, lambda t: {n: x * float("inf") if "o_proj" in n else x for n, x in t.items()}
            ),
            "base'",
        ),
        (lambda b, s: (s / "config.json").unlink(), "config.json"),
        (lambda b, s: shutil.rmtree(b), "Nothing is downloaded"),
    ],
)
def test_what_cannot_be_fused_is_refused_and_nothing_is_left(models, break_it, message):
    base, sft = models
    break_it(base, sft)
    with pytest.raises((ValueError, OSError), match=message):
        rejuvenate_checkpoint(base, sft, sft.parent / "out", alpha=0.5)
    assert sorted(p.name for p in sft.parent.iterdir()) in (["base", "sft"], ["sft"])


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
    monkeypatch.setattr("lightning_rejuv.checkpoints.pairing._PIECE", 100)
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
    from lightning_rejuv.checkpoints.pairing import check_differ, pair_up
    from lightning_rejuv.checkpoints.reader import open_checkpoint

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
