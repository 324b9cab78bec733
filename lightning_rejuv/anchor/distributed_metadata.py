"""The metadata of a ``torch.distributed.checkpoint`` folder: read as plain data, checked, and returned by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv.anchor.pickled import Made, Named, Pairs, read_pickle

METADATA = ".metadata"

_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = f"{_CHECKPOINT}.metadata"
# Everything that the metadata of a checkpoint of tensors is made of; any other name is refused.
_KNOWN = {
    ("builtins", "getattr"),  # how Python 3.11 writes the member of an enumeration
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}
_MAX_METADATA = 1 << 29  # bytes; a million chunks take less
_MAX_NAME = 4096
_MAX_FIELDS = 16  # of an object
_MAX_RANK = 64  # of a tensor in PyTorch


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, and the bytes of a file that hold it.

    Attributes:
        offsets: of its first element, in every dimension.
        sizes: its shape.
        file: name of the file, which lies beside the metadata.
        start: number of the first byte.
        length: in bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor: its shape, its dtype and the chunks that it is made of."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def read_metadata(path: Path) -> dict[str, Stored]:
    """Return what the metadata say of every tensor, by name; entries that are no tensors are left out.

    The metadata are a pickle. No name in it is imported and nothing in it is called.

    Args:
        path: the file.

    Raises:
        ValueError: it holds anything but a checkpoint's own types, or something in it does not fit the rest.
        OSError: it cannot be read.
    """
    try:
        if path.stat().st_size > _MAX_METADATA:
            raise ValueError(f"it has more than {_MAX_METADATA} bytes")
        metadata = read_pickle(path.read_bytes(), _check_name)
        return dict(_tensors(_state(metadata, f"{_METADATA}.Metadata")))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} could not be read as the metadata of a distributed checkpoint: {error}. "
            "Nothing in it was run."
        ) from error


def _check_name(module: str, name: str) -> None:
    if (module, name) not in _KNOWN and (module != "torch" or _dtype(f"torch.{name}") is None):
        raise ValueError(f"{module[:80]}.{name[:80]} is not part of a checkpoint's metadata")


def _dtype(name: str) -> torch.dtype | None:
    found = vars(torch).get(name.removeprefix("torch."))
    return found if isinstance(found, torch.dtype) else None


def _tensors(metadata: Pairs) -> Iterator[tuple[str, Stored]]:
    """Check every tensor's entry, and yield its name and what it says."""
    places = _places(_field(metadata, "storage_data", Pairs))
    seen = set()
    for name, entry in _field(metadata, "state_dict_metadata", Pairs):
        if type(name) is not str or len(name) > _MAX_NAME or name in seen:
            raise ValueError("a tensor's name is no string, too long, or there twice")
        seen.add(name)
        if type(entry) is Made and entry.kind == f"{_METADATA}.BytesStorageMetadata":
            continue
        try:
            yield name, _stored(name, _state(entry, f"{_METADATA}.TensorStorageMetadata"), places)
        except ValueError as error:
            raise ValueError(f"the tensor {name!r:.200} has {error}") from error


# By tensor and offset: the file, the first byte and the number of bytes.
_Places = dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]


def _places(storage: Pairs) -> _Places:
    found: _Places = {}
    for key, value in storage:
        index = _state(key, f"{_METADATA}.MetadataIndex")
        name = _field(index, "fqn", str)
        try:
            offset = next(
                (_size(v) for k, v in index if type(k) is str and k == "offset" and v is not None), None
            )
            place = _place(_state(value, f"{_CHECKPOINT}.filesystem._StorageInfo"))
        except ValueError as error:
            raise ValueError(f"the tensor {name!r:.200} has {error}") from error
        if (name, offset) in found:
            raise ValueError(f"the tensor {name!r:.200} has a chunk that lies in two places")
        found[name, offset] = place
    return found


def _place(state: Pairs) -> tuple[str, int, int]:
    file = _field(state, "relative_path", str)
    if file in ("", ".", "..") or any(c in file for c in "/\\\0") or len(file) > _MAX_NAME:
        raise ValueError(f"its bytes in {file!r:.200}, which does not lie beside it")
    if any(k == "transform_descriptors" and v for k, v in state):
        raise ValueError(f"its bytes in {file!r:.200} compressed: save the checkpoint without extensions")
    return file, _natural(_field(state, "offset", int)), _natural(_field(state, "length", int))


def _stored(name: str, entry: Pairs, places: _Places) -> Stored:
    size, dtype = _size(_field(entry, "size", Made)), _dtype_of(_field(entry, "properties", Made))
    numel = math.prod(size)
    chunks = []
    for part in _field(entry, "chunks", list):
        block = _state(part, f"{_METADATA}.ChunkStorageMetadata")
        offsets, sizes = (_size(_field(block, field, Made)) for field in ("offsets", "sizes"))
        if len(offsets) != len(size) or len(sizes) != len(size):
            raise ValueError(f"a chunk that is no block of its shape {size}")
        if any(o + s > whole for o, s, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a chunk at {offsets} of shape {sizes} that reaches beyond its shape {size}")
        # A place is used once: no chunk stands there twice, and nothing that the pickle shares multiplies the work.
        place = places.pop((name, offsets), None) or places.pop((name, None), None)
        if place is None:
            raise ValueError(f"no bytes for its chunk at {offsets}")
        if math.prod(sizes) * dtype.itemsize > place[2]:
            raise ValueError(f"a chunk of shape {sizes} in {place[2]} bytes, which cannot hold it")
        chunks.append(Chunk(offsets, sizes, *place))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != numel:
        raise ValueError(f"chunks that do not cover its shape {size}")
    return Stored(size, dtype, tuple(chunks))


def _dtype_of(properties: Made) -> torch.dtype:
    state = properties.state
    if properties.kind == f"{_METADATA}.TensorProperties" and type(state) is tuple and state:
        found = _dtype(state[0].name) if type(state[0]) is Named else None
        if found is not None:
            return found
    raise ValueError("no dtype")


def _state(value: Any, kind: str) -> Pairs:
    """Return the fields of an object that has to be of a kind, made without arguments."""
    state = value.state if type(value) is Made and value.kind == kind and not value.arguments else None
    if not isinstance(state, Pairs) or len(state) > _MAX_FIELDS:
        raise ValueError(f"something else where {kind.rpartition('.')[2]} belongs")
    return state


def _field(state: Pairs, name: str, kind: type) -> Any:
    found = [value for key, value in state if type(key) is str and key == name]
    if len(found) != 1 or type(found[0]) is not kind:
        raise ValueError(f"no `{name}`, or not of its kind")
    return found[0]


def _size(value: Any) -> tuple[int, ...]:
    if type(value) is not Made or value.kind != "torch.Size" or len(value.arguments) != 1:
        raise ValueError("something else where torch.Size belongs")
    (sizes,) = value.arguments
    if type(sizes) is not tuple or len(sizes) > _MAX_RANK:
        raise ValueError(f"a shape that is no tuple of at most {_MAX_RANK} numbers")
    found = tuple(_natural(size) for size in sizes)
    if math.prod(max(1, size) for size in found) >= 1 << 63:
        raise ValueError("a shape with more than 2**63 elements")
    return found


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a number that is not from 0 to 2**63")
    return value
