"""The header of a safetensors file: it is read and checked byte by byte, and written."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# By the codes of the format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_MAX_RANK = 64  # of a tensor in PyTorch
_MAX_SIZE = 1 << 63  # of a dimension, and of all of them together, in PyTorch
_MAX_NAME = 4096
_SHOWN = 200  # characters of what a file says, in a message


@dataclass(frozen=True)
class Entry:
    """The place of one tensor in a file.

    Attributes:
        name: its name on disk.
        dtype: its dtype.
        shape: its shape.
        offset: the place of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The tensors of one file in the order of their bytes, its free-form metadata, and its size in bytes."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ValueError: the file is truncated or is no safetensors file: a length, an offset, a dtype or a
            shape does not fit the others, or is larger than a tensor can be. The message names file and tensor.
        OSError: the file cannot be read.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"Expected {str(path)!r} to start with the length of a safetensors header that fits its "
                f"{size} bytes but got {length}. The file is truncated or is not a safetensors file."
            )
        raw = _parse(path, file.read(length))
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(t) for pair in metadata.items() for t in pair):
        raise ValueError(f"Expected `__metadata__` in {str(path)!r} to map strings to strings.")
    entries = [_entry(path, name, value, 8 + length) for name, value in raw.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise ValueError(
                f"Expected tensor {entry.name!r:.{_SHOWN}} in {str(path)!r} to start at byte {end} but its header says "
                f"{entry.offset}: tensors overlap or leave a gap."
            )
        end += entry.nbytes
    if end != size:
        raise ValueError(
            f"Expected {str(path)!r} to have {end} bytes, as its header says, but it has {size}. "
            "The file is truncated or was changed: copy it again."
        )
    return Header(tuple(entries), metadata, size)


def read_shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
    """Return shape and dtype of every tensor, by name, as the library ``safetensors`` reads them.

    The dtype is None if ``DTYPES`` does not have it.

    Raises:
        ValueError: a tensor has more dimensions or elements than a tensor can have.
        SafetensorError: the library refuses the file.
    """
    found = {}
    with safe_open(path, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            part = handle.get_slice(name)
            shape = part.get_shape()
            if len(shape) > _MAX_RANK or has_too_many_elements(shape):
                raise ValueError(
                    f"the tensor {name!r:.{_SHOWN}} has more dimensions or elements than a tensor can have"
                )
            found[name] = torch.Size(shape), DTYPES.get(part.get_dtype())
    return found


def map_tensor(file: FileIO, entry: Entry) -> Tensor:
    """Map one tensor of an open file into memory, from where it lies: the header is not read again.

    What is looked at is read, and needs no memory that the system could not take back; what is written stays private.

    Raises:
        OSError: the file cannot be mapped, or ends too early.
    """
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    start = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    before = entry.offset - start
    try:
        mapped = mmap.mmap(file.fileno(), before + entry.nbytes, access=mmap.ACCESS_COPY, offset=start)
    except ValueError as error:
        raise OSError(f"{str(file.name)!r} ended early: it was changed while read.") from error
    content = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.nbytes, offset=before)
    if before % entry.dtype.itemsize:  # a number has to begin at a multiple of its size
        content = content.clone()
    return content.view(entry.dtype).view(entry.shape)


def build_header(
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the bytes that stand before the first tensor of a file which holds these tensors in this order.

    Args:
        entries: name, dtype and shape of each tensor.
        metadata: free-form strings; if there are none, the header has no such part.

    >>> len(build_header([("w", torch.bfloat16, (2, 3))], {"format": "pt"})) % 8
    0
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def has_too_many_elements(shape: Sequence[int]) -> bool:
    """Tell whether a tensor of a shape has more elements than PyTorch can count.

    Sizes of zero are left out of the product, as PyTorch does when it multiplies sizes to strides.

    >>> has_too_many_elements((0, 2**62, 2**62))
    True
    """
    return math.prod(size for size in shape if size) >= _MAX_SIZE


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        # No float belongs in a header. `int` takes quadratic time, or refuses without naming the tensor; a number
        # that is too long for an offset becomes one that no tensor can have, so that the message names it.
        raw = json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_int=lambda digits: int(digits) if len(digits) < 20 else math.inf,
            parse_float=lambda _: math.inf,
            parse_constant=lambda _: math.inf,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The header of {str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise ValueError(
            f"Expected the header of {str(path)!r} to be a mapping but got {type(raw).__name__}."
        )
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    where = f"tensor {name!r:.{_SHOWN}} in {str(path)!r}"
    if len(name) > _MAX_NAME or not _is_text(name):
        raise ValueError(f"Expected {where} to have a name of at most {_MAX_NAME} Unicode characters.")
    fields = value if isinstance(value, dict) else {}
    shape, offsets = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(
            f"Expected {where} to have a `shape` and two `data_offsets`, at most {_MAX_RANK} integers from 0 to 2**63, "
            f"but got {value!r:.{_SHOWN}}."
        )
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None:
        got = f"{fields.get('dtype')!r:.{_SHOWN}}"
        raise ValueError(f"Expected {where} to have one of the dtypes {sorted(DTYPES)} but got {got}.")
    if has_too_many_elements(shape):
        raise ValueError(
            f"Expected {where} to have fewer than 2**63 elements but its shape is {tuple(shape)}."
        )
    entry = Entry(name, dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(
            f"Expected {where} to take {entry.nbytes} bytes for {dtype} {tuple(shape)} but its offsets are {offsets}."
        )
    return entry


def _naturals(value: Any) -> list[int] | None:
    if not isinstance(value, list) or len(value) > _MAX_RANK:
        return None
    return value if all(type(v) is int and 0 <= v < _MAX_SIZE for v in value) else None


def _is_text(value: Any) -> bool:
    """Tell whether a value is a string that can be written again: JSON can hold halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
