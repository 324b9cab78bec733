"""A checkpoint directory that is open: its config, its weight files, and its tensors by the names they have on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_rejuv.anchor.config import configs
from lightning_rejuv.anchor.files import ADAPTER_CONFIG, CONFIG, INDEX, SINGLE, read_json, weight_files
from lightning_rejuv.anchor.header import Entry, Header, read_header
from lightning_rejuv.config import PathLike
from lightning_rejuv.names import listing
from lightning_rejuv.weights.refusals import QUANTISED_NAME

_COMPARED = 1 << 20  # elements that are compared at a time
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# Gives a tensor by its name on disk.
Read = Callable[[str], Tensor]
# Gives rows of a tensor as a matrix, see `grid`: of its entry, the first row and the row after the last.
Rows = Callable[[Entry, int, int], Tensor]
# Is told what was read of a file: its name, the place of the first byte, and the bytes.
Seen = Callable[[str, int, memoryview], None]


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint directory; no tensor is read until it is asked for.

    Attributes:
        path: the directory.
        config: the content of ``config.json``.
        shards: the header of every weight file, by file name, in the order of the names.
        place: the file name and the entry of every tensor, by its name on disk.
        index: the content of the index file; None if one file holds everything.
        left_out: weight files in the directory that no loader reads: of an earlier save, or of a variant.
        renamed: whether ``place`` has other names than the files.
        made: for tensors that stand in ``place`` and in no file, what puts each together, by name.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, Header]
    place: dict[str, tuple[str, Entry]]
    index: dict[str, Any] | None
    left_out: tuple[str, ...] = ()
    renamed: bool = False
    made: Mapping[str, Callable[[Read], Tensor]] = field(default_factory=dict)

    def entry(self, name: str) -> Entry:
        """Return a tensor's dtype, shape and offset."""
        return self.place[name][1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for _, entry in self.place.values())


def open_checkpoint(path: PathLike, role: str = "checkpoint") -> Checkpoint:
    """Read the headers of a checkpoint directory and check them against each other.

    Args:
        path: directory with ``config.json`` and ``model.safetensors``, or with shards and their index: what
            transformers would load. A ``~`` at its start is the user's home directory.
        role: how messages name the checkpoint.

    Raises:
        FileNotFoundError: the directory or a file in it does not exist.
        ValueError: a file is truncated or malformed, the index names files outside the directory, or index
            and shards do not agree.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"Expected the {role} to be a directory but there is none at {str(root)!r}. Nothing is "
            "downloaded: pass a local directory as `save_pretrained` writes it."
        )
    if (root / ADAPTER_CONFIG).is_file() and not (root / CONFIG).is_file():
        raise FileNotFoundError(_nothing_there(root, role))
    config = read_json(root / CONFIG)
    files = weight_files(root)
    if files is None:
        raise FileNotFoundError(_nothing_there(root, role))
    shards = {name: read_header(root / name) for name in files.names}
    place = {entry.name: (file, entry) for file, header in shards.items() for entry in header.entries}
    if files.index is not None:
        _check_index(root, files.index["weight_map"], place, shards)
    if not place:
        raise ValueError(f"Expected the {role} {str(root)!r} to hold tensors but it holds none.")
    return Checkpoint(root, config, shards, place, files.index, files.left_out)


def left_out(checkpoint: Checkpoint, role: str) -> list[str]:
    """Say which weight files of a checkpoint were not read, because no loader reads them."""
    if not checkpoint.left_out:
        return []
    return [
        f"the {role} holds weight files that transformers does not load and that were not read: "
        f"{listing(checkpoint.left_out)}; it loads {listing(checkpoint.shards)}"
    ]


def check_fusable(checkpoint: Checkpoint, role: str) -> None:
    """Refuse quantised weights.

    Raises:
        ValueError: the config names a quantisation, or tensors are stored in quantised form.
    """
    said = (part.get("quantization_config") for part in configs(checkpoint.config))
    quantization = next(filter(None, said), None)
    quantised = [
        name
        for name, (_, entry) in checkpoint.place.items()
        if entry.dtype in _FLOAT8
        or QUANTISED_NAME.search(name)
        or (name.endswith(".weight") and not entry.dtype.is_floating_point)
    ]
    if quantization or quantised:
        found = f"quantised tensors {listing(quantised)}"
        if quantization:
            found = f"`quantization_config` {quantization!r:.120}"
        raise ValueError(
            f"Expected the {role} {str(checkpoint.path)!r} to hold full-precision weights but found {found}: an "
            "interpolation of quantised numbers means nothing. Dequantise it first and save it as bfloat16."
        )


def _nothing_there(root: Path, role: str) -> str:
    hint = "Save it with `save_pretrained`, which writes safetensors; pickled weights are never read."
    if (root / ADAPTER_CONFIG).is_file():
        hint = "This is a PEFT adapter: it can stand as the SFT model, never as the base."
    elif any(root.glob("model*.safetensors")):
        hint = f"Files of another name are not loaded: a variant has to be renamed to {SINGLE}."
    return f"Expected {SINGLE} or {INDEX} in the {role} {str(root)!r} but found {listing(os.listdir(root))}. {hint}"


def _check_index(
    root: Path, weights: dict[str, str], place: dict[str, tuple[str, Entry]], shards: dict[str, Header]
) -> None:
    if sum(len(header.entries) for header in shards.values()) != len(place):
        raise ValueError(f"Expected every tensor in {str(root)!r} once but some stand in two shards.")
    wrong = [name for name, file in weights.items() if place.get(name, ("",))[0] != file]
    if wrong:
        raise ValueError(
            f"{str(root / INDEX)!r} names tensors that their shards do not hold: {listing(wrong)}."
        )
    extra = place.keys() - weights.keys()
    if extra:
        raise ValueError(f"The shards in {str(root)!r} hold tensors that the index lacks: {listing(extra)}.")


def grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a tensor's shape as rows of its last dimension; a vector is a column.

    >>> grid((2, 3, 4)), grid((5,)), grid(())
    ((6, 4), (5, 1), (1, 1))
    """
    columns = shape[-1] if len(shape) > 1 else 1
    return math.prod(shape[:-1] if len(shape) > 1 else shape), columns


def pieces(shape: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    """Go through a tensor's rows in pieces: the first row of each, and the row after its last.

    Args:
        shape: of the tensor; its rows are those of :func:`grid`.
        size: how many elements a piece has at most, unless a single row has more.

    >>> list(pieces((5, 10), 20))
    [(0, 2), (2, 4), (4, 5)]
    """
    rows, columns = grid(shape)
    step = max(1, size // max(1, columns))
    for start in range(0, rows if columns else 0, step):
        yield start, min(rows, start + step)


class Reader:
    """Reads rows of a checkpoint's tensors straight into memory of their own, never through a mapping.

    So what is read counts once, in buffers of the caller's size, and a file that shrinks meanwhile is an error
    instead of a bus error. Use the reader as a context manager.

    Args:
        checkpoint: what is read.
        seen: is told of everything that is read; the tensors must then be left as they are.
    """

    def __init__(self, checkpoint: Checkpoint, seen: Seen | None = None) -> None:
        self._checkpoint, self._seen = checkpoint, seen
        self._files: dict[str, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Return ``count`` elements of a tensor in row-major order from element ``start``; all by default.

        Raises:
            OSError: the file cannot be read, or ends too early.
        """
        file, entry = self._checkpoint.place[name]
        if name in self._checkpoint.made:
            whole = self._checkpoint.made[name](self.tensor).flatten()
            return whole[start:] if count is None else whole[start : start + count]
        count = entry.numel - start if count is None else count
        buffer = torch.empty(count * entry.dtype.itemsize, dtype=torch.uint8, device="cpu")
        view, offset = _view(buffer), entry.offset + start * entry.dtype.itemsize
        self._fill(file, view, offset)
        if self._seen is not None:
            self._seen(file, offset, view)
        return buffer.view(entry.dtype)

    def rows(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Return rows of a tensor, as :func:`grid` counts them: [stop - start, columns]."""
        columns = grid(entry.shape)[1]
        return self.read(entry.name, start * columns, (stop - start) * columns).view(-1, columns)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor in its shape."""
        return self.read(name).view(self._checkpoint.entry(name).shape)

    def equal(self, first: str, second: str) -> bool:
        """Tell whether two tensors agree in dtype, shape and every value; they are read in pieces."""
        one, two = self._checkpoint.entry(first), self._checkpoint.entry(second)
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        return all(
            torch.equal(self.read(first, start, count), self.read(second, start, count))
            for start in range(0, one.numel, _COMPARED)
            for count in (min(_COMPARED, one.numel - start),)
        )

    def _fill(self, file: str, view: memoryview, offset: int) -> None:
        if file not in self._files:
            self._files[file] = os.open(self._checkpoint.path / file, os.O_RDONLY)
        while view:
            got = os.preadv(self._files[file], [view], offset)
            if got == 0:
                raise OSError(
                    f"{str(self._checkpoint.path / file)!r} ended early: it was changed while read."
                )
            view, offset = view[got:], offset + got


def _view(buffer: Tensor) -> memoryview:
    # Not every NumPy that is taken declares that its arrays are buffers.
    return memoryview(cast(Any, buffer.numpy()))


@contextmanager
def reading(*checkpoints: Checkpoint) -> Iterator[list[Reader]]:
    """Open readers for several checkpoints at once."""
    with ExitStack() as stack:
        yield [stack.enter_context(Reader(checkpoint)) for checkpoint in checkpoints]
