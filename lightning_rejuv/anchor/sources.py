"""Everything that an anchor can be read from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_rejuv._compat import persistent_buffers
from lightning_rejuv.anchor.anchor import Anchor, AnchorSource
from lightning_rejuv.names import canonical_name, listing

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_METADATA = ".metadata"
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
# What safetensors calls the types that an anchor may have, or is often found to have by mistake.
_DTYPES: dict[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}


def open_anchor(source: AnchorSource) -> Anchor:
    """Open an anchor; see :meth:`Anchor.open`."""
    if isinstance(source, Anchor):
        return source
    if isinstance(source, nn.Module):
        tensors = {
            **dict(persistent_buffers(source)),
            **dict(source.named_parameters(remove_duplicate=False)),
        }
        return _TensorAnchor(tensors, "the given module")
    if isinstance(source, Mapping):
        return _TensorAnchor(source, "the given state dict")
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source))
    raise TypeError(
        "Expected the anchor to be a module, a state dict or a path "
        f"but got {type(source).__name__}. Pass for example the directory of the base model."
    )


class _TensorAnchor(Anchor):
    """Tensors that are in memory, or memory-mapped by ``torch.load``."""

    def __init__(self, tensors: Mapping[str, Any], description: str) -> None:
        self._tensors = {canonical_name(k): v.detach() for k, v in tensors.items() if isinstance(v, Tensor)}
        self._description = description
        if not self._tensors:
            raise ValueError(f"Expected {description} to hold tensors by name but it holds none.")

    @property
    def description(self) -> str:
        return self._description

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def held(self) -> Iterable[tuple[str, Tensor]]:
        return self._tensors.items()

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class _SafetensorsAnchor(Anchor):
    """One or more safetensors files; only the header is read until a tensor is asked for."""

    def __init__(self, files: list[Path], description: str) -> None:
        self._description = description
        self._place: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._dtypes: dict[str, str] = {}
        for file in files:
            try:
                self._read_header(file)
            except SafetensorError as error:
                raise ValueError(
                    f"Expected a whole safetensors file in {str(file)!r} but reading it ended with: {error}. Was it "
                    "copied or saved to its end?"
                ) from error

    def _read_header(self, file: Path) -> None:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                name = canonical_name(key)
                self._place[name] = (file, key)
                self._shapes[name] = torch.Size(handle.get_slice(key).get_shape())
                self._dtypes[name] = handle.get_slice(key).get_dtype()

    @property
    def description(self) -> str:
        return self._description

    def names(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype | None:
        return _DTYPES.get(self._dtypes[name])

    def tensor(self, name: str) -> Tensor:
        file, key = self._place[name]
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(key)  # type: ignore[no-any-return]


class _DistributedAnchor(Anchor):
    """A ``torch.distributed.checkpoint`` folder."""

    def __init__(self, path: Path) -> None:
        from lightning_rejuv.anchor.distributed import (
            DistributedCheckpoint,  # importing it takes over a second
        )

        self._checkpoint = DistributedCheckpoint(path)
        self._names = {canonical_name(name): name for name in self._checkpoint.names}
        self._description = str(path)

    @property
    def description(self) -> str:
        return self._description

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> torch.Size:
        return self._checkpoint.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(self._names[name])

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(self._names[name])


def _open_path(path: Path) -> Anchor:
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise FileNotFoundError(
            f"Expected the anchor at {str(path)!r} but there is no such file or directory. "
            "Nothing is downloaded: pass the local directory of the base model."
        )
    if path.name == _METADATA:
        return _DistributedAnchor(path.parent)
    if path.suffix == ".safetensors":
        return _SafetensorsAnchor([path], str(path))
    if path.suffix in _PICKLED:
        return _open_checkpoint(path)
    raise ValueError(
        f"Expected the anchor {str(path)!r} to be a directory, a .safetensors file or one of "
        f"{', '.join(_PICKLED)} but its name ends in {path.suffix!r}."
    )


def _open_directory(path: Path) -> Anchor:
    if (path / _METADATA).is_file() and not _is_hugging_face(path):
        return _DistributedAnchor(path)
    if (path / _INDEX).is_file():
        shards = sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise ValueError(f"Expected {_INDEX} to name files beside it but it names {listing(outside)}.")
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise FileNotFoundError(f"{path / _INDEX} names shards that do not exist: {listing(missing)}.")
        return _SafetensorsAnchor([path / shard for shard in shards], str(path))
    if (path / _SINGLE).is_file():
        return _SafetensorsAnchor([path / _SINGLE], str(path))
    raise ValueError(
        f"Expected {_SINGLE} or {_INDEX} in {str(path)!r} but found {listing(os.listdir(path))}. "
        "Save the base with `save_pretrained`, which writes safetensors."
    )


def _is_hugging_face(path: Path) -> bool:
    """Whether a directory has what Hugging Face's have: its ``.metadata`` is then never looked at."""
    ends = (".safetensors", ".safetensors.index.json")
    return any(name == "config.json" or name.endswith(ends) for name in os.listdir(path))


def _open_checkpoint(path: Path) -> Anchor:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} could not be read with `weights_only=True` ({error}). Files that need "
            "unpickling are refused: save the weights alone, as safetensors or as a state dict."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise ValueError(f"Expected {str(path)!r} to hold a state dict but got {type(state).__name__}.")
    return _TensorAnchor(state, str(path))
