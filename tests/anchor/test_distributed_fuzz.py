"""Whatever a `.metadata` file holds: nothing runs, nothing is patched, and only the library's own error leaves."""

from __future__ import annotations

import builtins
import os
import pathlib
import pickle
import pickletools
import random
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from lightning_rejuv.anchor.distributed import DistributedCheckpoint
from tests.anchor import planted
from tests.anchor.planted import METADATA, Touch, name, number, text

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# What Python reports of itself wherever it happens, and a reader of data never does.
_DEEDS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "exec",
    "import",
)
_seen: list[tuple[str, object]] = []
_watching = False


def _hook(event, arguments):
    if _watching and event in _DEEDS:
        _seen.append((event, arguments))


sys.addaudithook(_hook)  # cannot be taken away again: it looks only while it is asked to


def state_of_the_modules():
    """Everything that a pickle could have given a state, by name."""
    classes = [c for c in vars(metadata).values() if isinstance(c, type)]
    classes += [filesystem._StorageInfo, torch.Size, pathlib.Path, pathlib.PosixPath]
    state = {f"{c.__module__}.{c.__qualname__}.{k}": v for c in classes for k, v in vars(c).items()}
    enum = metadata._MEM_FORMAT_ENCODING
    state |= {f"members.{k}": v for k, v in {**enum._value2member_map_, **enum._member_map_}.items()}
    state |= {
        f"{m.__name__}.{k}": v for m in (metadata, filesystem, os, builtins) for k, v in vars(m).items()
    }
    return {key: (id(value), len(value) if isinstance(value, dict) else 0) for key, value in state.items()}


def seeds(folder):
    """Real metadata, metadata made to harm, and plain attacks."""
    shapes = {"a": (3, 2), "b": (4,)}
    state = {"a": torch.ones(3, 2), "b": torch.ones(4), "n": 3, "t": {"x": [1, "y"]}}
    dcp.save(state, checkpoint_id=folder / "one")
    dcp.save({"state_dict": state, "optimizer": state}, checkpoint_id=folder / "two")
    real = [(folder / which / ".metadata").read_bytes() for which in ("one", "two")]
    old = [pickle.dumps(pickle.loads(content), protocol) for content in real for protocol in (2, 3, 5)]
    evil = planted.bytes_entry_through_an_enumeration(shapes, 500)
    enum, run = name(METADATA, "_MEM_FORMAT_ENCODING"), name("os", "system")
    touch = text(f"touch {folder / 'RAN'}") + b"\x85R"
    attacks = [
        pickle.dumps(Touch(folder / "RAN")),
        b"\x80\x02" + run + touch + b".",
        b"\x80\x02"
        + name("builtins", "getattr")
        + name("os", "system")
        + text("__call__")
        + b"\x86R"
        + touch
        + b".",
        b"\x80\x02" + enum + b"(N}" + text("_value2member_map_") + b"}" + number(0) + run + b"sstb.",
        b"\x80\x02" + name(METADATA, "Metadata") + b"}" + text("__reduce__") + run + b"sb.",
        b"\x80\x02" + name(METADATA, "Metadata") + b")\x81}" + text("__class__") + run + b"sb.",
        b"\x80\x02" + name("torch.serialization", "_get_layout") + touch + b".",
        b"\x80\x02" + name(METADATA, "BytesStorageMetadata") + b")\x81" + text("x") + run + b"s.",
        b"\x80\x02" + name("collections", "OrderedDict") + b")R" + enum + run + b"s.",
    ]
    return [*real, *old, evil, evil, evil, *attacks]


def fragments():
    """Single operations, and pieces that mean something."""
    pieces = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
    pieces += [name("os", "system"), name("builtins", "exec"), name("builtins", "getattr"), text("__dict__")]
    pieces += [name(METADATA, "_MEM_FORMAT_ENCODING"), name(METADATA, "Metadata"), name("torch", "Size")]
    pieces += [text("__setstate__"), text("__class__"), text("/etc/passwd"), text("../x"), number(2**62)]
    pieces += [number(-1), b")R", b")\x81", b"}b", b"(N}tb", b"0", b"2", b"\x94", b"h\x00", b"N}\x86b"]
    return pieces


def values_of(content):
    """Places of the bytes of numbers and strings: where one changes, the rest of the program still runs."""
    found = []
    operations = list(pickletools.genops(content))
    for (opcode, _, start), (_, _, stop) in pairwise(operations):
        if opcode.name in ("BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINGET"):
            found += range(start + (1 if opcode.name in ("BININT1", "BININT2", "BINGET") else 2), stop)
    return found


def mutant(draw, pool, pieces, values):
    content = bytearray(draw.choice(pool))
    if values[bytes(content)] and draw.random() < 0.3:
        for at in draw.choices(values[bytes(content)], k=draw.choice((1, 2))):
            content[at] = draw.choice((draw.randrange(256), content[at] ^ 1, draw.randrange(4)))
        return bytes(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at, kind = draw.randrange(len(content) + 1), draw.randrange(6)
        if kind == 0 and at < len(content):
            content[at] = draw.randrange(256)
        elif kind == 1:
            content[at:at] = draw.choice(pieces)
        elif kind == 2:
            del content[at : at + draw.choice((1, 2, 5, 40))]
        elif kind == 3:
            other = draw.choice(pool)
            start = draw.randrange(len(other))
            content[at : at + draw.randrange(60)] = other[start : start + draw.randrange(1, 200)]
        elif kind == 4:
            content[at:at] = content[at : at + draw.randrange(1, 60)] * draw.choice((1, 2, 5))
        elif at < len(content):
            content[at] ^= 1 << draw.randrange(8)
    return bytes(content)


def run(folder, monkeypatch, count, seed):
    global _watching
    proof, target = folder / "RAN", folder / "target"
    pool, pieces, draw = seeds(folder), fragments(), random.Random(seed)
    values = {content: values_of(content) for content in pool}
    target.mkdir()
    planted.plant(folder, {"a": (3, 2)}, proof)
    # The tensors of one real checkpoint, and after them bytes that would create a file, as many as the other has.
    evil = (folder / "__0_0.distcp").read_bytes() * 20
    (target / "__0_0.distcp").write_bytes((folder / "one" / "__0_0.distcp").read_bytes() + evil)
    calls = []
    for module, what in (
        (os, "system"),
        (os, "popen"),
        (subprocess, "Popen"),
        (builtins, "exec"),
        (builtins, "eval"),
    ):
        monkeypatch.setattr(module, what, lambda *arguments, **_: calls.append(arguments))
    (target / ".metadata").write_bytes(pool[0])
    found = DistributedCheckpoint(target)
    assert [found.tensor(n) for n in found.names]  # imports whatever is imported at the first use
    before = state_of_the_modules()
    opened = read = 0
    for _ in range(count):
        content = mutant(draw, pool, pieces, values)
        (target / ".metadata").write_bytes(content)
        _watching = True
        try:
            found = DistributedCheckpoint(target)
            opened += 1
            for which in found.names:
                assert found.tensor(which).shape == found.shape(which)
                read += 1
        except (ValueError, FileNotFoundError):
            pass
        finally:
            _watching = False
        assert not _seen, content
        assert not calls, content
        assert not proof.exists(), content
    assert state_of_the_modules() == before
    print(f"{count} mutants: {opened} opened, {read} tensors read, nothing ran")
    assert opened > count / 100  # the mutants are not all refused at their first byte


def test_mutated_metadata_run_nothing(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, 2000, seed=0)


@pytest.mark.slow
def test_thirty_thousand_mutated_metadata_run_nothing(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, 30_000, seed=1)


def test_the_watch_sees_what_pythons_own_reader_does(tmp_path):
    global _watching
    evil = pickle.dumps(Touch(tmp_path / "RAN"))
    _watching = True
    try:
        pickle.loads(evil)
    finally:
        _watching = False
    assert {event for event, _ in _seen} >= {"pickle.find_class", "os.system"}
    _seen.clear()
    assert (tmp_path / "RAN").exists()
