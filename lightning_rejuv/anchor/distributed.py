"""An anchor in a ``torch.distributed.checkpoint`` folder, of which only tensors are unpickled."""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_rejuv.anchor.archive import check_stored
from lightning_rejuv.anchor.distributed_metadata import METADATA, Chunk, read_metadata
from lightning_rejuv.anchor.links import lies_within


class DistributedCheckpoint:
    """The tensors of a distributed checkpoint, each read only when it is asked for.

    Its metadata, which is a pickle, is read as plain data: no name in it is imported and nothing in it is called.
    Entries that are no tensors are never read.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: the metadata name a file that does not exist.
        ValueError: the metadata hold anything but a checkpoint's own types, or do not fit the files.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = read_metadata(path / METADATA)
        self._check_files()
        nested = [name for name in self._tensors if name.startswith("state_dict.")]
        # Lightning keeps the model under "state_dict", beside optimizer states.
        self.names = {n.removeprefix("state_dict."): n for n in (nested or self._tensors)}

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from the metadata."""
        return torch.Size(self._tensors[self.names[name]].size)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the metadata."""
        return self._tensors[self.names[name]].dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor onto the CPU.

        Raises:
            ValueError: its bytes are not what the metadata say.
            OSError: they cannot be read.
        """
        stored = self._tensors[self.names[name]]
        if stored.chunks and stored.chunks[0].sizes == stored.size:
            return self._read(name, stored.chunks[0], stored.dtype)
        found = torch.empty(stored.size, dtype=stored.dtype)
        covered = torch.zeros(stored.size, dtype=torch.bool)
        for chunk in stored.chunks:
            block = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            found[block] = self._read(name, chunk, stored.dtype)
            covered[block] = True
        if not bool(covered.all()):
            raise ValueError(
                f"Expected the chunks of {name!r:.200} in {str(self._path)!r} to cover it but some overlap."
            )
        return found

    def _check_files(self) -> None:
        """Check that every chunk has bytes of its own in a file of the folder: no tensor is larger than the files."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for stored in self._tensors.values():
            for chunk in stored.chunks:
                ranges.setdefault(chunk.file, []).append((chunk.start, chunk.start + chunk.length))
        for name, found in ranges.items():
            file = self._path / name
            if not os.path.lexists(file):
                raise FileNotFoundError(
                    f"Expected the file {name!r} in {str(self._path)!r} but there is none."
                )
            if not lies_within(self._path, name) or not file.is_file():
                raise ValueError(
                    f"Expected {str(file)!r} to be a file of the checkpoint but it is none, or a link that leads out."
                )
            found.sort()
            if any(start < end for (_, end), (start, _) in pairwise(found)):
                raise ValueError(
                    f"Expected every chunk in {str(file)!r} to have bytes of its own but some overlap."
                )
            size, end = file.stat().st_size, found[-1][1]
            if size < end:
                raise ValueError(
                    f"Expected {str(file)!r} to have at least {end} bytes, as {METADATA} says, but it has {size}. "
                    "Was it copied or saved to its end?"
                )

    def _read(self, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        with (self._path / chunk.file).open("rb") as file:
            file.seek(chunk.start)
            content = file.read(chunk.length)
        where = f"the tensor {name!r:.200} in {str(self._path / chunk.file)!r}"
        try:
            check_stored(io.BytesIO(content), len(content))
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever malformed bytes lead to
            raise ValueError(
                f"{where} could not be read with `weights_only=True` ({error!s:.500})."
            ) from error
        plain = type(found) in (Tensor, nn.Parameter) and found.layout is torch.strided
        if (
            not plain
            or found.device.type != "cpu"
            or found.dtype != dtype
            or tuple(found.shape) != chunk.sizes
        ):
            raise ValueError(f"Expected {where} to be {dtype} of shape {chunk.sizes}, as {METADATA} says.")
        return found.detach().contiguous()  # type: ignore[no-any-return]
