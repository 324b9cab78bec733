"""Distributed checkpoints that are made to harm: what they would run only creates a file, or counts."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import torch

METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


class Touch:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def put(key: int) -> bytes:
    return b"r" + struct.pack("<I", key)


def get(key: int) -> bytes:
    return b"j" + struct.pack("<I", key)


def bytes_entry_through_an_enumeration(shapes: dict[str, tuple[int, ...]], length: int) -> bytes:
    """Metadata of allowed classes alone that give an enumeration's class a state, so that PyTorch's reader takes
    a tensor's entry for one of pickled bytes."""
    enum, entry_of_bytes = name(METADATA, "_MEM_FORMAT_ENCODING"), name(METADATA, "BytesStorageMetadata")
    out = b"\x80\x02" + enum + put(1) + b"0" + entry_of_bytes + b")R" + put(3) + b"0"
    out += get(1) + b"(" + number(0) + b"tR" + put(6) + b"0"

    def members(table: bytes) -> bytes:
        return get(1) + b"(N}" + text("_value2member_map_") + table + b"stb0"

    for i, (_, shape) in enumerate(sorted(shapes.items())):
        properties = name(METADATA, "TensorProperties") + b"(" + name("torch", "float32") + b"tR"
        size = name("torch", "Size") + b"((" + b"".join(map(number, shape)) + b"ttR"
        out += (
            name(METADATA, "TensorStorageMetadata") + b"(" + properties + size + b"]tR" + put(100 + i) + b"0"
        )
        second = text("second") + b"\x85" + get(3) + b"s"
        out += members(b"}" + get(6) + b"\x85" + get(100 + i) + b"s" + second)
        out += get(1) + b"(" + get(6) + b"\x85tR" + put(1000 + i) + b"0"
    out += members(b"}" + number(0) + text("second") + b"s") + name(METADATA, "Metadata") + b"(}"
    out += b"".join(text(key) + get(1000 + i) + b"s" for i, key in enumerate(sorted(shapes)))
    out += b"N}"
    for key in sorted(shapes):
        place = text("__0_0.distcp") + number(0) + number(length)
        out += name(METADATA, "MetadataIndex") + b"(" + text(key) + b"tR"
        out += name(FILES, "_StorageInfo") + b"(" + place + b"tRs"
    return out + b"tR."


def plant(directory: Path, shapes: dict[str, tuple[int, ...]], proof: Path) -> None:
    """Put such metadata into a directory, and bytes beside them that create ``proof`` when they are unpickled."""
    blob = io.BytesIO()
    torch.save(Touch(proof), blob)
    (directory / "__0_0.distcp").write_bytes(blob.getvalue())
    (directory / ".metadata").write_bytes(bytes_entry_through_an_enumeration(shapes, len(blob.getvalue())))
