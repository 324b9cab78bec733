"""An anchor in a ``torch.distributed.checkpoint`` folder, read without trusting its pickled metadata."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

# Everything that the metadata of a checkpoint of tensors is made of; any other name is refused.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")


class _SafeReader(FileSystemReader):
    """PyTorch's reader, which unpickles the metadata of any folder, with the metadata's types alone."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except Exception as error:
            raise ValueError(
                f"{str(path)!r} could not be read safely: {error}. Nothing was unpickled."
            ) from error
        if not isinstance(metadata, Metadata):
            raise ValueError(
                f"Expected {str(path)!r} to hold a checkpoint's metadata but got {type(metadata)}."
            )
        return metadata


class DistributedCheckpoint:
    """The tensors of a distributed checkpoint, each read only when it is asked for.

    Args:
        path: the folder.

    Raises:
        ValueError: the metadata holds anything but a checkpoint's own types.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        entries = _SafeReader(path).read_metadata().state_dict_metadata
        self._tensors = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        nested = [name for name in self._tensors if name.startswith("state_dict.")]
        # Lightning keeps the model under "state_dict", beside optimizer states.
        self.names = {n.removeprefix("state_dict."): n for n in (nested or self._tensors)}

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from the metadata."""
        return self._tensors[self.names[name]].size

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the metadata."""
        return self._tensors[self.names[name]].properties.dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        key = self.names[name]
        dtype = self._tensors[key].properties.dtype
        state = {key: torch.empty(self._tensors[key].size, dtype=dtype)}
        load(state, storage_reader=_SafeReader(self._path), no_dist=True)
        return state[key]
