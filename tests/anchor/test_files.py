"""The files that are read are those that transformers loads, whatever else lies in the directory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rejuv.anchor import Anchor
from lightning_rejuv.anchor.files import read_json, weight_files
from lightning_rejuv.checkpoints.reader import open_checkpoint, reading
from tests.conftest import tiny_llama

_META = {"format": "pt"}
_INDEX = "model.safetensors.index.json"


def shards(
    path, state, value, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
):
    parts = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    for name, part in zip(names, parts, strict=True):
        save_file({k: torch.full_like(v, value) for k, v in part.items()}, path / name, _META)
    index = {k: name for name, part in zip(names, parts, strict=True) for k in part}
    (path / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def whole(path, state, value, name="model.safetensors"):
    save_file({k: torch.full_like(v, value) for k, v in state.items()}, path / name, _META)


def named(path, state, value):
    whole(path, state, value, "own.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "transformers_weights": "own.safetensors"}))


@pytest.mark.parametrize(
    "layout",
    [
        (shards,),
        (whole,),
        (shards, whole),
        (whole, shards),
        (shards, lambda p, s, v: whole(p, s, v, "model.fp16.safetensors")),
        (whole, lambda p, s, v: whole(p, s, v, "consolidated.safetensors")),
        (lambda p, s, v: shards(p, s, v, ("a.safetensors", "b.safetensors")), shards),
        (whole, shards, named),
        (
            whole,
            lambda p, s, v: torch.save(
                {k: torch.full_like(t, v) for k, t in s.items()}, p / "pytorch_model.bin"
            ),
        ),
    ],
)
def test_both_routes_read_what_transformers_loads(layout, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for value, write in enumerate(layout, 1):
        write(tmp_path, state, float(value))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    anchor, checkpoint = Anchor.open(tmp_path), open_checkpoint(tmp_path)
    assert sorted(anchor.names()) == sorted(checkpoint.place) == sorted(state)
    with reading(checkpoint) as (reader,):
        for name in state:
            assert torch.equal(anchor.tensor(name), loaded[name]), name
            assert torch.equal(reader.tensor(name), loaded[name]), name


def test_what_is_not_loaded_is_named(tmp_path):
    state = load_file(_saved(tmp_path))
    shards(tmp_path, state, 1.0)
    whole(tmp_path, state, 2.0, "model.fp16.safetensors")
    whole(tmp_path, state, 2.0, "consolidated.safetensors")
    files = weight_files(tmp_path)
    assert files is not None
    assert files.names == ("model.safetensors",)
    assert files.left_out == (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.fp16.safetensors",
    )


def test_a_variant_alone_is_not_loaded_without_being_named(tmp_path):
    _saved(tmp_path).rename(tmp_path / "model.fp16.safetensors")
    assert weight_files(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"a variant has to be renamed to model.safetensors"):
        open_checkpoint(tmp_path)


def test_a_model_beside_an_adapter_is_refused_since_both_are_loaded(tmp_path):
    _saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for load in (Anchor.open, open_checkpoint):
        with pytest.raises(ValueError, match=r"holds a model \(model.safetensors\) and an adapter"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "", "..", "a/b.safetensors", "x\0"])
def test_names_outside_the_directory_are_refused(name, tmp_path):
    _saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / _INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="to name files beside it"):
        weight_files(tmp_path)
    (tmp_path / _INDEX).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(ValueError, match="to name files beside it"):
        weight_files(tmp_path)


def test_home_is_expanded_and_variables_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    _saved(tmp_path / "base")
    assert Anchor.open("~/base").names() == Anchor.open(tmp_path / "base").names()
    assert open_checkpoint("~/base").path == tmp_path / "base"
    with pytest.raises(FileNotFoundError, match=r"\$HOME/base"):
        Anchor.open("$HOME/base")


def _saved(path):
    tiny_llama().save_pretrained(path)
    return path / "model.safetensors"


def test_a_file_of_json_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(ValueError, match="config.json' to have at most"):
        read_json(tmp_path / "config.json")
