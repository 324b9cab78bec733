"""One model in an anchor that holds several, and which one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rejuv import rejuvenate
from lightning_rejuv.anchor import Anchor, match
from lightning_rejuv.names import base_name
from tests.conftest import shifted, tiny_llama


@pytest.fixture(scope="module")
def models():
    base = tiny_llama()
    return base, shifted(base, 0.1), shifted(base, 0.2, seed=2)


def under(**parts):
    return {
        f"{prefix.replace('__', '.')}.{k}": v
        for prefix, m in parts.items()
        for k, v in m.state_dict().items()
    }


PREFIXES = [
    ("model", "ref"),
    ("policy", "reference"),
    ("model", "ema_model"),
    ("actor__model", "ref__model"),
    ("model", "teacher", "ema"),
    ("averaged_model__module", "model"),
]


@pytest.mark.parametrize(
    ("prefixes", "form"), [*((p, "mapping") for p in PREFIXES), (PREFIXES[3], "ckpt"), (PREFIXES[0], "dcp")]
)
def test_an_anchor_that_holds_several_models_is_refused_unless_one_is_named(prefixes, form, models, tmp_path):
    base, sft, third = models
    state = under(**dict(zip(prefixes, (sft, base, third), strict=False)))
    source = _as(form, state, tmp_path)
    with pytest.raises(ValueError, match="holds several whose tensors differ") as error:
        match(sft, Anchor.open(source).read_as(sft))
    names = [prefix.replace("__", ".") + "." for prefix in prefixes]
    assert all(repr(name) in str(error.value) for name in names)
    for name, model in zip(names, (sft, base, third), strict=False):
        ways = [Anchor.open(source, prefix=name), Anchor.open(source, prefix=name.rstrip("."))]
        ways += [Anchor.open(f"{source}::{name}")] if form != "mapping" else []
        for anchor in ways:
            there = match(sft, anchor)
            assert all(torch.equal(anchor.tensor(there[n]), p) for n, p in model.named_parameters())
    edited = shifted(base, 0.3)
    rejuvenate(edited, Anchor.open(source, prefix=names[1]), alpha=0.0)
    assert all(torch.equal(p, q) for p, q in zip(edited.parameters(), base.parameters(), strict=True))


def _as(form, state, path):
    if form == "mapping":
        return state
    if form == "ckpt":
        torch.save({"state_dict": state}, path / "last.ckpt")
        return path / "last.ckpt"
    import torch.distributed.checkpoint as dcp

    dcp.save({"state_dict": state}, checkpoint_id=path / "dcp")
    return path / "dcp"


def test_equal_copies_are_one_model(models):
    base, sft, _ = models
    anchor = Anchor.open(under(model=base, ref=base))
    assert match(sft, anchor)["lm_head.weight"] in ("ref.lm_head.weight", "model.lm_head.weight")
    module = nn.ModuleDict({"policy": sft, "ref": base})
    with pytest.raises(ValueError, match=r"'policy\.', 'ref\.'"):
        match(sft, Anchor.open(module))


def test_a_copy_of_other_shapes_is_no_second_model(models):
    base = models[0]
    anchor = Anchor.open(under(policy=base, critic=tiny_llama(hidden_size=32)))
    assert match(base, anchor)["lm_head.weight"] == "policy.lm_head.weight"


def test_the_models_own_names_beside_a_copy(models):
    base, sft, _ = models
    state = {**base.state_dict(), **under(ref=sft)}
    with pytest.raises(ValueError, match=r"their names begin with \['', 'ref\.'\]"):
        match(sft, Anchor.open(state))


def test_a_prefix_that_no_name_has(models, tmp_path):
    torch.save({"state_dict": under(model=models[0])}, tmp_path / "last.ckpt")
    for way in (
        lambda: Anchor.open(tmp_path / "last.ckpt", prefix="ref."),
        lambda: Anchor.open(f"{tmp_path}/last.ckpt::ref"),
    ):
        with pytest.raises(ValueError, match=r"Expected names that begin with 'ref\.' in .*last\.ckpt"):
            way()
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        Anchor.open(tmp_path / "nowhere.ckpt::ref.")


def test_names_of_a_base_under_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    base = tiny_llama()
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, **settings))
    names = {base_name(name) for name, _ in model.named_parameters()} - {None}
    assert names == {name for name, _ in base.named_parameters()}
    outer = nn.ModuleDict({"model": model})
    assert {base_name(name) for name, _ in outer.named_parameters()} - {None} == {f"model.{n}" for n in names}


@pytest.mark.parametrize("key", ["model", "module", "model_state_dict"])
def test_a_training_checkpoint_with_the_state_dict_under_a_key(key, models, tmp_path):
    base, sft, _ = models
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    saved = {key: base.state_dict(), "optimizer": optimizer, "rng_state": {"cpu": torch.zeros(2)}, "epoch": 1}
    torch.save(saved, tmp_path / "last.pt")
    for source in (saved, tmp_path / "last.pt", f"{tmp_path}/last.pt::{key}"):
        edited = shifted(sft, 0.0)
        rejuvenate(edited, source, alpha=0.0)
        assert all(torch.equal(p, q) for p, q in zip(edited.parameters(), base.parameters(), strict=True))
    with pytest.raises(ValueError, match=rf"several whose tensors differ.*'ema\.', '{key}\.'"):
        match(sft, Anchor.open({**saved, "ema": sft.state_dict()}))


def test_one_model_of_several_is_checked_as_a_whole_anchor_is(models):
    base, sft, _ = models
    module = nn.ModuleDict({"policy": shifted(sft, 0.0), "ref": base})
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"'policy\.' shares its memory with the model"):
        rejuvenate(module["policy"], Anchor.open(module, prefix="policy."), alpha=0.5)
    narrow = {f"ref.{n}": p.to(torch.float8_e4m3fn) for n, p in base.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"16 bits or more but got .*'lm_head.weight \(torch.float8_e4m3fn\)'"
    ):
        rejuvenate(module["policy"], Anchor.open(narrow, prefix="ref"), alpha=0.5)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
