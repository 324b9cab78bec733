from __future__ import annotations

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_rejuv.anchor.header import build_header, read_header

STATE = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.ones(0, 3),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "flag": torch.tensor([True, False]),
}
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def file_with(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_reads_what_the_reference_writes(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    for entry in header.entries:
        expected = STATE[entry.name]
        assert (entry.shape, entry.dtype) == (tuple(expected.shape), expected.dtype)
        data = raw[entry.offset : entry.offset + entry.nbytes]
        got = torch.frombuffer(bytearray(data), dtype=entry.dtype) if data else torch.empty(0)
        assert torch.equal(got.view(expected.shape), expected)


def test_the_reference_reads_what_is_written(tmp_path):
    names = list(STATE)
    header = build_header(
        [(n, STATE[n].dtype, tuple(STATE[n].shape)) for n in names], {"format": "pt", "ü": "é"}
    )
    data = b"".join(STATE[n].flatten().view(torch.uint8).numpy().tobytes() for n in names)
    (tmp_path / "x.safetensors").write_bytes(header + data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[n], STATE[n]) for n in names)
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "ü": "é"}


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"123", "it has"),
        ({"a": entry()}, b"12345", "it has"),
        ({"a": entry(offsets=(4, 8))}, b"12345678", "overlap or leave a gap"),
        ({"a": entry(), "b": entry()}, b"1234", "overlap or leave a gap"),
        ({"a": entry(offsets=(4, 0))}, b"1234", "to take 4 bytes"),
        ({"a": entry(shape=(2,))}, b"1234", "to take 8 bytes"),
        ({"a": entry(shape=(2**62, 2**62))}, b"1234", "fewer than 2\\*\\*63 elements"),
        ({"a": entry(shape=(0, 2**62, 2**62))}, b"", "fewer than 2\\*\\*63 elements"),
        ({"a": entry(shape=(2**63,))}, b"1234", "'a' in .*x.safetensors.*a `shape` and two `data_offsets`"),
        ({"a": entry(shape=(1,) * 65)}, b"1234", "'a' .*at most 64 integers"),
        ({"a": entry(shape=(1.0,))}, b"1234", "'a' .*a `shape`"),
        ({"a": entry(offsets=(0, 1e30))}, b"1234", "'a' .*a `shape`"),
        ({"a": entry(offsets=(False, 4))}, b"1234", "'a' .*two `data_offsets`"),
        ({"a": entry(offsets=(-4, 0))}, b"1234", "'a' .*two `data_offsets`"),
        ({"a": entry(dtype="F" * 10**6)}, b"1234", "'a' .*one of the dtypes .{0,400}$"),
        ({"n" * 10**6: entry()}, b"1234", "^Expected tensor 'n{100,200} in .{0,300}at most 4096"),
        ({"\ud800": entry()}, b"1234", "Unicode characters"),
        ({"__metadata__": {"\ud800": "x"}}, b"", "`__metadata__`"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,Infinity]}}', b"", "'a' .*a `shape`"),
        (b'{"a":' + b'{"b":' * 10**5 + b"1" + b"}" * 10**5 + b"}", b"", "x.safetensors' is not valid JSON"),
        ({"a": entry(shape=(-1,))}, b"1234", "a `shape` and two `data_offsets`"),
        ({"a": entry(shape=(True,))}, b"1234", "a `shape` and two `data_offsets`"),
        ({"a": entry(offsets=(0, 4, 8))}, b"1234", "a `shape` and two `data_offsets`"),
        ({"a": entry(dtype="Q4")}, b"1234", "one of the dtypes"),
        ({"a": 3}, b"", "a `shape` and two"),
        ({"__metadata__": {"a": 1}}, b"", "`__metadata__`"),
        ([1], b"", "to be a mapping"),
        (b'{"a":1,"a":2}', b"", "twice"),
        (b"{", b"", "not valid JSON|truncated"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, header, data, message):
    path = file_with(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=message):
        read_header(path)


@pytest.mark.parametrize("digits", [20, 4000, 5000, 100_000])
@pytest.mark.parametrize("where", ["shape", "data_offsets", "dtype", "beside"])
def test_long_numbers_are_refused_at_once_and_the_tensor_is_named(tmp_path, digits, where):
    """Two megabytes of digits: multiplied, or only read as integers, they would keep this test for minutes."""
    many = "[" + ",".join(["9" * digits] * (2_000_000 // digits)) + "]"
    fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]", where: many}
    if where == "beside":
        fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,5]", where: many}
    text = '{"a":{' + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}}"
    path = file_with(tmp_path / "x.safetensors", text.encode(), b"1234")
    with pytest.raises(ValueError, match=r"tensor 'a' in '.*x.safetensors' to .{0,500}$"):
        read_header(path)


@pytest.mark.parametrize(
    "raw", [b"", b"1234", struct.pack("<Q", 2**63), struct.pack("<Q", 0), struct.pack("<Q", 9)]
)
def test_a_wrong_length_is_refused(tmp_path, raw):
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="length of a safetensors header"):
        read_header(tmp_path / "x.safetensors")


@few
@given(position=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 60))
def test_a_damaged_file_is_read_as_the_reference_reads_it_or_refused(tmp_path, position, byte, cut):
    """Whatever is changed: never another exception, and never more than the reference accepts."""
    path = tmp_path / "x.safetensors"
    save_file(STATE, path, {"format": "pt"})
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = byte
    path.write_bytes(raw[: len(raw) - cut] if cut < 30 else raw)
    try:
        ours = {e.name: (e.shape, e.dtype) for e in read_header(path).entries}
    except ValueError:
        return
    with safe_open(path, "pt") as f:
        assert set(f.keys()) == set(ours)
        for name, (shape, dtype) in ours.items():
            tensor = f.get_tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@few
@given(
    content=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), any_json, max_size=3),
    data=st.binary(max_size=9),
)
def test_any_json_as_header_is_read_or_refused(tmp_path, content, data):
    path = file_with(tmp_path / "x.safetensors", content, data)
    with contextlib.suppress(ValueError):
        read_header(path)
