from __future__ import annotations

import io
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_rejuv.anchor import Anchor
from lightning_rejuv.anchor.distributed import DistributedCheckpoint
from tests.anchor.planted import Touch

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE = {
    "a": torch.arange(6, dtype=torch.float32).view(3, 2),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.ones(0, 4),
    "fp8": torch.ones(3).to(torch.float8_e4m3fn),
}


@pytest.fixture
def saved(tmp_path):
    dcp.save({**STATE, "epoch": 3, "note": {"x": [1, 2]}}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def write(path, tensors, places, blobs=None):
    """Write a checkpoint by hand: (shape, dtype, chunks) and (file, start, length) by name."""
    path.mkdir(exist_ok=True)
    entries = {
        name: TensorStorageMetadata(
            TensorProperties(dtype),
            torch.Size(shape),
            [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks],
        )
        for name, (shape, dtype, chunks) in tensors.items()
    }
    storage = {
        MetadataIndex(name, offset, 0): _StorageInfo(*place)
        for name, found in places.items()
        for offset, place in found.items()
    }
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, storage)))
    for file, blob in (blobs or {}).items():
        (path / file).write_bytes(blob)
    return path


def stored(value):
    blob = io.BytesIO()
    torch.save(value, blob)
    return blob.getvalue()


def one(path, value, shape, dtype=torch.float32, **place):
    """A checkpoint of one tensor "w", in one chunk."""
    blob = value if isinstance(value, bytes) else stored(value)
    where = {"file": "__0_0.distcp", "start": 0, "length": len(blob), **place}
    zero = (0,) * len(shape)
    return write(
        path,
        {"w": (shape, dtype, [(zero, shape)])},
        {"w": {zero: tuple(where.values())}},
        {"__0_0.distcp": blob},
    )


def test_every_tensor_is_what_pytorch_reads(saved):
    expected = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    dcp.load(expected, checkpoint_id=saved)
    anchor = Anchor.open(saved)
    assert set(anchor.names()) == set(expected)  # neither the number nor the dictionary
    for name, tensor in expected.items():
        assert anchor.shape(name) == tensor.shape
        assert anchor.tensor(name).dtype == tensor.dtype
        assert torch.equal(anchor.tensor(name).float(), tensor.float())


def test_chunks_are_put_where_they_belong(tmp_path):
    whole = torch.arange(35, dtype=torch.float32).view(5, 7)
    blobs, places, chunks = {}, {}, []
    for rows in (slice(0, 2), slice(2, 5)):
        for columns in (slice(0, 3), slice(3, 7)):
            part, offset = whole[rows, columns].clone(), (rows.start, columns.start)
            file = f"__{rows.start}_{columns.start}.distcp"
            blobs[file] = b"before" + stored(part)
            places[offset] = (file, 6, len(blobs[file]) - 6)
            chunks.append((offset, tuple(part.shape)))
    write(tmp_path / "x", {"w": ((5, 7), torch.float32, chunks)}, {"w": places}, blobs)
    assert torch.equal(Anchor.open(tmp_path / "x").tensor("w"), whole)
    both = [chunks[0], chunks[0], chunks[2], chunks[3]]
    write(tmp_path / "x", {"w": ((5, 7), torch.float32, both)}, {"w": places}, blobs)
    with pytest.raises(ValueError, match="'w' has no bytes for its chunk"):
        Anchor.open(tmp_path / "x")


def test_chunks_that_overlap_leave_nothing_unread(tmp_path):
    part = stored(torch.ones(2))
    blobs = {"a": part, "b": part}
    tensors = {"w": ((4,), torch.float32, [((0,), (2,)), ((1,), (2,))])}
    write(tmp_path / "x", tensors, {"w": {(0,): ("a", 0, len(part)), (1,): ("b", 0, len(part))}}, blobs)
    with pytest.raises(ValueError, match="to cover it but some overlap"):
        Anchor.open(tmp_path / "x").tensor("w")


def test_a_folder_is_opened_only_where_it_holds_nothing_else(saved):
    from safetensors.torch import save_file

    beside = saved.parent / "beside"
    for name, found in {
        "config.json": "Expected model.safetensors",
        "model.safetensors.index.json": "not exist|weight_map|index",
        "model-00001-of-00002.safetensors": "Expected model.safetensors",
        "adapter_model.safetensors": "Expected model.safetensors",
    }.items():
        shutil.copytree(saved, beside)
        (beside / name).write_text('{"weight_map": {"w": "gone.safetensors"}}')
        with pytest.raises((ValueError, FileNotFoundError), match=found):
            Anchor.open(beside)
        assert torch.equal(Anchor.open(beside / ".metadata").tensor("a"), STATE["a"])
        shutil.rmtree(beside)
    shutil.copytree(saved, beside)
    save_file({"other": torch.ones(2)}, beside / "model.safetensors")
    assert Anchor.open(beside).names() == ["other"]


def test_bytes_are_never_unpickled(tmp_path):
    proof = tmp_path / "RAN"
    with pytest.raises(ValueError, match="could not be read with `weights_only=True`"):
        Anchor.open(one(tmp_path / "a", Touch(proof), (3,))).tensor("w")
    with pytest.raises(ValueError, match="could not be read with `weights_only=True`"):
        Anchor.open(one(tmp_path / "b", pickle.dumps(Touch(proof)).ljust(64), (3,))).tensor("w")
    path = tmp_path / "c"
    path.mkdir()
    entries = {"w": BytesStorageMetadata()}
    places = {MetadataIndex("w"): _StorageInfo("__0_0.distcp", 0, 64)}
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, places)))
    assert Anchor.open(path).names() == []
    assert not proof.exists()


@pytest.mark.parametrize(
    "file", ["../outside", "/etc/passwd", "a/../../outside", "..", ".", "", "a/b", "x\0y", "a\\b"]
)
def test_a_file_outside_is_refused(tmp_path, file):
    blob = stored(torch.ones(3))
    (tmp_path / "outside").write_bytes(blob)
    with pytest.raises(ValueError, match="which does not lie beside it"):
        Anchor.open(one(tmp_path / "x", torch.ones(3), (3,), file=file))


def test_a_link_that_leads_out_is_refused_and_one_within_is_followed(tmp_path):
    path = one(tmp_path / "x", torch.ones(3), (3,))
    (path / "__0_0.distcp").rename(tmp_path / "outside")
    (path / "__0_0.distcp").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="or a link that leads out"):
        Anchor.open(path)
    (tmp_path / "outside").rename(path / "inside")
    (path / "__0_0.distcp").unlink()
    (path / "__0_0.distcp").symlink_to("inside")
    assert torch.equal(Anchor.open(path).tensor("w"), torch.ones(3))
    # The layout of the Hugging Face Hub's cache.
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((".metadata", "inside")):
        (path / name).rename(blobs / str(number))
        (snapshot / (name if number == 0 else "__0_0.distcp")).symlink_to(f"../../blobs/{number}")
    assert torch.equal(Anchor.open(snapshot).tensor("w"), torch.ones(3))


def test_files_that_are_gone_short_or_no_files(tmp_path):
    path = one(tmp_path / "x", torch.ones(3), (3,))
    content = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"at least \d+ bytes"):
        Anchor.open(path)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected the file '__0_0.distcp'"):
        Anchor.open(path)
    (path / "__0_0.distcp").mkdir()
    with pytest.raises(ValueError, match="to be a file of the checkpoint"):
        Anchor.open(path)


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ((2**60,), [((0,), (2**60,))], "cannot hold it"),
        ((2**62, 2**62), [((0, 0), (2**62, 2**62))], "more than 2\\*\\*63 elements"),
        ((0, 2**62, 2**62), [], "more than 2\\*\\*63 elements"),
        ((3,), [((1,), (3,))], "reaches beyond its shape"),
        ((3,), [((0,), (2,))], "do not cover its shape"),
        ((3,), [], "do not cover its shape"),
        ((3,), [((0, 0), (3, 1))], "no block of its shape"),
        ((1,) * 65, [((0,) * 65, (1,) * 65)], "at most 64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name_before_memory_is_taken(tmp_path, shape, chunks, message):
    blob = stored(torch.ones(3))
    places = {o: ("__0_0.distcp", 0, len(blob)) for o, _ in chunks}
    path = write(tmp_path / "x", {"w": (shape, torch.float32, chunks)}, {"w": places}, {"__0_0.distcp": blob})
    with pytest.raises(ValueError, match=f"'w' has .*{message}"):
        Anchor.open(path)


def test_chunks_that_share_bytes_are_refused(tmp_path):
    """A million chunks over the same gigabyte would be a tensor of a million gigabytes."""
    blob = stored(torch.ones(3))
    places = {(i,): ("__0_0.distcp", 0, len(blob)) for i in (0, 3)}
    tensors = {"w": ((6,), torch.float32, [((0,), (3,)), ((3,), (3,))])}
    with pytest.raises(ValueError, match="bytes of its own but some overlap"):
        Anchor.open(write(tmp_path / "x", tensors, {"w": places}, {"__0_0.distcp": blob}))


def test_what_was_stored_is_checked_against_the_metadata(tmp_path):
    for value in (torch.ones(4), torch.ones(3, dtype=torch.float64), [1.0], torch.ones(3).to_sparse()):
        with pytest.raises(ValueError, match="as .metadata says|weights_only"):
            Anchor.open(one(tmp_path / "x", value, (3,))).tensor("w")
    with pytest.raises(ValueError, match="as .metadata says"):
        Anchor.open(one(tmp_path / "x", torch.ones(3, device="meta"), (3,))).tensor("w")
    assert torch.equal(
        Anchor.open(one(tmp_path / "x", torch.nn.Parameter(torch.ones(3)), (3,))).tensor("w"), torch.ones(3)
    )


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(stored(torch.zeros(10_000)))) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(ValueError, match="compressed"):
        Anchor.open(one(tmp_path / "x", packed.getvalue(), (4,))).tensor("w")


def test_work_does_not_multiply_within_the_metadata(tmp_path):
    """A list of chunks that many tensors share, and a state that many objects share: minutes, if it did."""
    (tmp_path / "x").mkdir()
    chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([0]))] * 20_000
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([0]), chunks)
    shared = BytesStorageMetadata()
    shared.__dict__.update({str(i): i for i in range(20_000)})
    for metadata in (
        Metadata({str(i): entry for i in range(20_000)}, None, {}),
        Metadata({}, None, {MetadataIndex(str(i)): shared for i in range(20_000)}),
    ):
        (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match="could not be read as the metadata"):
            DistributedCheckpoint(tmp_path / "x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"\x80\x04.",
        b"(" * 100_000,
        b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x04" + b"N" + b"\x85" * 100_000 + b".",
        b"\x80\x04" + b"}" + b"N" * 3 + b"u.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b"x.",
        b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".",
        b"\x80\x04h\x05.",
        b"\x80\x04X\x02\x00\x00\x00\xff\xfe.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\x02P1\n.",
        b"\x80\x02NQ.",
        b"\x80\x02\x82\x01.",
        b"\x80\x05\x97.",
        b"\x80\x04(cos\nsystem\nX\x01\x00\x00\x00xo.",
        b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.",
    ],
)
def test_a_pickle_that_is_no_metadata_is_refused(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="Nothing in it was run"):
        Anchor.open(tmp_path)
