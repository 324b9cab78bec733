from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_rejuv.anchor import Anchor, match, sources
from lightning_rejuv.anchor.header import build_header, map_tensor, read_header
from tests.conftest import shifted, tiny_llama


def _equal(anchor: Anchor, model: nn.Module) -> None:
    names = match(model, anchor)
    assert set(names) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(anchor.tensor(names[name]), parameter)


def test_every_source_gives_the_same_tensors(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    torch.save({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "last.ckpt")
    sources = [model, model.state_dict(), *(tmp_path / n for n in ("single", "sharded"))]
    sources += [str(tmp_path / "weights.safetensors"), tmp_path / "last.ckpt"]
    for source in sources:
        _equal(Anchor.open(source), model)


def test_wrapper_prefixes_and_a_modules_attribute_are_bridged_both_ways():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    outer = nn.ModuleDict({"model": net})
    compiled = {f"_orig_mod.{k}": v for k, v in net.state_dict().items()}
    assert match(net, Anchor.open(compiled))["0.weight"] == "0.weight"
    assert match(net, Anchor.open(outer))["0.weight"] == "model.0.weight"
    assert match(outer, Anchor.open(net))["model.0.weight"] == "0.weight"


def test_other_weights_beside_the_model_in_a_checkpoint_do_not_matter():
    net = nn.Linear(2, 1)
    state = {f"net.{k}": v for k, v in net.state_dict().items()} | {"critic.weight": torch.ones(3)}
    assert match(net, Anchor.open(state)) == {"weight": "net.weight", "bias": "net.bias"}


def test_buffers_in_a_state_dict_are_no_extra_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    _equal(Anchor.open(net.state_dict()), net)


def test_a_tied_parameter_is_found_under_either_name():
    model = tiny_llama(tie_word_embeddings=True)
    assert "lm_head.weight" not in dict(model.named_parameters())
    state = dict(model.state_dict())
    assert match(model, Anchor.open(state))["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    embedding = state.pop("model.embed_tokens.weight")
    assert match(model, Anchor.open(state))["model.embed_tokens.weight"] == "lm_head.weight"
    state["model.embed_tokens.weight"] = embedding + 1
    with pytest.raises(ValueError, match="holds different tensors"):
        match(model, Anchor.open(state))


def test_what_does_not_match_prints_both_lists():
    with pytest.raises(ValueError, match=r"Only in the model: \['bias'\]. Only in the anchor: \['scale'\]"):
        match(nn.Linear(2, 2), Anchor.open({"weight": torch.ones(2, 2), "scale": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"tensors that the model does not have: \['bias'\]"):
        match(nn.Linear(2, 2, bias=False), Anchor.open(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"'weight' to have shape \(2, 2\) but got .*\(2, 3\)"):
        match(nn.Linear(2, 2, bias=False), Anchor.open({"weight": torch.ones(2, 3)}))
    with pytest.raises(ValueError, match="do not hold the same parameters"):
        match(tiny_llama(), Anchor.open(tiny_llama(num_hidden_layers=1)))


def test_sources_that_hold_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        Anchor.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"Expected model.safetensors or .* but found \['notes.txt'\]"):
        (tmp_path / "notes.txt").touch()
        Anchor.open(tmp_path)
    with pytest.raises(ValueError, match="its name ends in '.txt'"):
        Anchor.open(tmp_path / "notes.txt")
    with pytest.raises(TypeError, match="a module, a state dict or a path but got int"):
        Anchor.open(3)
    with pytest.raises(ValueError, match="holds none"):
        Anchor.open({})


def test_an_index_that_names_other_or_missing_files_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match=r"names \['../outside.safetensors'\]"):
        Anchor.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "model-00001.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="model-00001.safetensors"):
        Anchor.open(tmp_path)


def test_a_file_that_was_cut_off_is_named(tmp_path):
    save_file({"w": torch.ones(64)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in (4, 40, len(whole) - 8):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a whole safetensors file in '.*model.safetensors' but"):
            Anchor.open(tmp_path)


def test_a_distributed_checkpoint(tmp_path):
    import torch.distributed.checkpoint as dcp

    model = tiny_llama(dtype=torch.bfloat16)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "plain")
    optimizer = {"state": {"0": {"exp_avg": torch.ones(3)}}, "epoch": 3}
    lightning = {
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
        "optimizer": optimizer,
    }
    dcp.save(lightning, checkpoint_id=tmp_path / "lightning")
    for name in ("plain", "lightning"):
        _equal(Anchor.open(tmp_path / name), model)


def test_the_metadata_of_a_distributed_checkpoint_is_not_trusted(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"builtins.exec is not part of a checkpoint's metadata"):
        Anchor.open(tmp_path)


class _Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_is_never_unpickled(tmp_path):
    torch.save({"state_dict": _Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="weights_only=True"):
        Anchor.open(tmp_path / "evil.ckpt")


def test_the_anchor_does_not_train_along():
    net = nn.Linear(2, 2)
    anchor = Anchor.open(shifted(net))
    before = anchor.tensor("weight").clone()
    with torch.no_grad():
        net.weight.copy_(anchor.tensor("weight")).add_(1)
    assert torch.equal(anchor.tensor("weight"), before)


def test_buffers_of_a_wrapped_model_are_no_extra_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    compiled = torch.compile(net, backend="eager")
    for source in (net.state_dict(), compiled.state_dict()):
        assert match(compiled, Anchor.open(source))["_orig_mod.1.weight"] == "1.weight"
        assert match(net, Anchor.open(source))["1.weight"] == "1.weight"


def test_a_prefix_is_found_by_any_name_of_a_tied_parameter():
    """A LightningModule's checkpoint in which the first parameter stands under its second name."""
    model = tiny_llama(tie_word_embeddings=True)
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    del state["net.model.embed_tokens.weight"]
    found = match(model, Anchor.open(state))
    assert found["model.embed_tokens.weight"] == "net.lm_head.weight"
    assert found["model.norm.weight"] == "net.model.norm.weight"


def test_tensors_of_every_kind_are_read_as_the_library_reads_them(tmp_path):
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
        "count": torch.tensor([2**40]),
        "eighth": torch.randn(4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    anchor = Anchor.open(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as library:
        for name in tensors:
            found, expected = anchor.tensor(name), library.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_a_header_is_read_once_and_again_if_the_file_is_another(tmp_path, monkeypatch):
    path, read = tmp_path / "x.safetensors", []
    original = sources.read_header
    monkeypatch.setattr(sources, "read_header", lambda file: read.append(file) or original(file))
    save_file({f"w{number}": torch.full((2,), float(number)) for number in range(50)}, path)
    anchor = Anchor.open(path)
    for number in (*range(50), 3):
        assert anchor.tensor(f"w{number}").tolist() == [number] * 2
    assert len(read) == 1
    save_file({f"w{number}": torch.full((2,), -1.0) for number in reversed(range(60))}, tmp_path / "y")
    (tmp_path / "y").replace(path)
    assert anchor.tensor("w3").tolist() == [-1.0, -1.0]
    assert len(read) == 2


def test_a_header_that_only_the_library_reads_is_left_to_it(tmp_path, monkeypatch):
    def strict(file):
        raise ValueError("a dtype of next year")

    monkeypatch.setattr(sources, "read_header", strict)
    save_file({"w": torch.arange(3.0)}, tmp_path / "x.safetensors")
    assert Anchor.open(tmp_path / "x.safetensors").tensor("w").tolist() == [0.0, 1.0, 2.0]


def test_tensors_that_begin_anywhere_are_mapped(tmp_path):
    """A file that another program has written: nothing is aligned."""
    path = tmp_path / "x.safetensors"
    values = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.arange(5.0),
        "half": torch.ones(3).bfloat16(),
    }
    table = [(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    content = b"".join(value.view(torch.uint8).numpy().tobytes() for value in values.values())
    path.write_bytes(build_header(table, {}) + content)
    anchor = Anchor.open(path)
    for name, value in values.items():
        assert torch.equal(anchor.tensor(name), value)
    anchor.tensor("wide").add_(1)  # nobody should; it stays private
    assert torch.equal(anchor.tensor("wide"), values["wide"])


def test_a_file_that_shrinks_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.ones(1000)}, path)
    entry = {entry.name: entry for entry in read_header(path).entries}["b"]
    os.truncate(path, 5000)
    with open(path, "rb", buffering=0) as file, pytest.raises(OSError, match="x.safetensors' ended early"):
        map_tensor(file, entry)


def test_a_file_that_is_written_anew_in_place_is_read_anew(tmp_path):
    """The same size and time of change, as far as anybody can set it."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    anchor, times = Anchor.open(path), path.stat()
    assert anchor.tensor("a").tolist() == [0.0] * 4
    content = bytearray(path.read_bytes())
    half = len(content) - 32
    header = content[8:half].replace(b'"a"', b'"?"').replace(b'"b"', b'"a"').replace(b'"?"', b'"b"')
    path.write_bytes(bytes(content[:8]) + bytes(header) + bytes(content[half:]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert anchor.tensor("a").tolist() == [1.0] * 4


def test_tensors_are_read_to_the_cpu_whatever_the_default_device_is(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    anchor = Anchor.open(tmp_path / "x.safetensors")
    with torch.device("meta"):
        assert anchor.tensor("a").tolist() == [1.0] * 4
