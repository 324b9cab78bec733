"""The sources of an anchor: modules, state dicts, files and directories."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_rejuv._compat import end_tokens, persistent_buffers
from lightning_rejuv.anchor.anchor import Anchor, AnchorSource
from lightning_rejuv.anchor.archive import check_stored
from lightning_rejuv.anchor.config import end_tokens as config_end_tokens
from lightning_rejuv.anchor.conversion import architecture, as_loaded
from lightning_rejuv.anchor.distributed import DistributedCheckpoint
from lightning_rejuv.anchor.distributed_metadata import METADATA
from lightning_rejuv.anchor.files import CONFIG, GENERATION, INDEX, SINGLE, read_json, weight_files
from lightning_rejuv.anchor.header import Entry, map_tensor, read_header, read_shapes
from lightning_rejuv.anchor.match import names_fit
from lightning_rejuv.names import canonical_name, listing, printable

_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_SEPARATOR = "::"  # between a path and a prefix
_Version = tuple[int, int, int, int]  # of a file: which it is, and when it was changed


def open_anchor(source: AnchorSource, prefix: str = "") -> Anchor:
    """Open an anchor; see :meth:`Anchor.open`."""
    if not prefix and isinstance(source, (str, os.PathLike)) and not Path(source).expanduser().exists():
        path, separator, after = os.fspath(source).rpartition(_SEPARATOR)
        source, prefix = (path, after) if separator else (source, "")
    anchor = _open(source)
    return _Part(anchor, prefix) if prefix else anchor


def _open(source: AnchorSource) -> Anchor:
    if isinstance(source, Anchor):
        return source
    if isinstance(source, nn.Module):
        tensors = {
            **dict(persistent_buffers(source)),
            **dict(source.named_parameters(remove_duplicate=False)),
        }
        return _TensorAnchor(tensors, "the given module", end_tokens(source))
    if isinstance(source, Mapping):
        return _TensorAnchor(source, "the given state dict")
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source).expanduser())
    raise TypeError(
        f"Expected the anchor to be a module, a state dict or a path but got {type(source).__name__}. Pass for "
        "example the directory of the base model."
    )


class _Part(Anchor):
    """One of several models in a checkpoint, by the prefix of its names."""

    def __init__(self, anchor: Anchor, prefix: str) -> None:
        self._anchor = anchor
        self._prefix = canonical_name(prefix.rstrip(".")) + "."
        if not self.names():
            raise ValueError(
                f"Expected names that begin with {self._prefix!r} in {anchor.description} but they are "
                f"{listing(anchor.names())}."
            )

    @property
    def description(self) -> str:
        return f"{self._anchor.description}, names with {self._prefix!r}"

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self._anchor.config

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._anchor.end_tokens

    def read_as(self, model: nn.Module) -> Anchor:
        return self if names_fit(model, self) else as_loaded(self, model)

    def names(self) -> list[str]:
        return [n.removeprefix(self._prefix) for n in self._anchor.names() if n.startswith(self._prefix)]

    def shape(self, name: str) -> torch.Size:
        return self._anchor.shape(self._prefix + name)

    def dtype(self, name: str) -> torch.dtype | None:
        return self._anchor.dtype(self._prefix + name)

    def held(self) -> Iterable[tuple[str, Tensor]]:
        held = self._anchor.held()
        return ((n.removeprefix(self._prefix), t) for n, t in held if n.startswith(self._prefix))

    def tensor(self, name: str) -> Tensor:
        return self._anchor.tensor(self._prefix + name)


class _TensorAnchor(Anchor):
    """Tensors that are in memory, or memory-mapped by ``torch.load``."""

    def __init__(self, tensors: Mapping[str, Any], description: str, ends: Iterable[int] = ()) -> None:
        self._tensors = {canonical_name(name): tensor.detach() for name, tensor in _by_name(tensors)}
        self._description, self._ends = description, tuple(ends)
        if not self._tensors:
            raise ValueError(f"Expected {description} to hold tensors by name but it holds none.")

    @property
    def description(self) -> str:
        return self._description

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._ends

    def read_as(self, model: nn.Module) -> Anchor:
        # A state dict may be what somebody read from the files of a directory.
        return self if names_fit(model, self) else as_loaded(self, model)

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


def _by_name(tensors: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield a state dict's tensors; of a training checkpoint (``{"model": …, "optimizer": …}``) with prefixes."""
    found = list(_named(tensors))
    yield from found
    for key, part in () if found else tensors.items():
        if isinstance(part, Mapping):
            yield from ((f"{key}.{name}", value) for name, value in _named(part))


def _named(values: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((n, v) for n, v in values.items() if isinstance(n, str) and isinstance(v, Tensor))


class _SafetensorsAnchor(Anchor):
    """One or more safetensors files; only the header is read until a tensor is asked for."""

    def __init__(
        self,
        files: list[Path],
        description: str,
        config: Mapping[str, Any] | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        self._description, self._config, self._ends = description, config, tuple(ends)
        self._loaded: dict[tuple[str, str], Anchor] = {}
        self._place: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._dtypes: dict[str, torch.dtype | None] = {}
        self._entries: dict[Path, tuple[_Version, dict[str, Entry]]] = {}
        for file in files:
            try:
                self._read_header(file)
            except (SafetensorError, ValueError) as error:
                raise ValueError(
                    f"Expected a whole safetensors file in {str(file)!r} but reading it ended with: {error}. Was it "
                    "copied or saved to its end?"
                ) from error

    def _read_header(self, file: Path) -> None:
        for key, (shape, dtype) in read_shapes(file).items():
            name = canonical_name(key)
            self._place[name] = (file, key)
            self._shapes[name], self._dtypes[name] = shape, dtype

    @property
    def description(self) -> str:
        return self._description

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self._config

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._ends

    def read_as(self, model: nn.Module) -> Anchor:
        key = architecture(model)
        if key is None:
            return self
        if key not in self._loaded:  # a monitor asks again at every measurement
            self._loaded = {key: as_loaded(self, model)}
        return self._loaded[key]

    def names(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype | None:
        return self._dtypes[name]

    def tensor(self, name: str) -> Tensor:
        file, key = self._place[name]
        with open(file, "rb", buffering=0) as opened:
            entry = self._entries_of(file, _version(os.fstat(opened.fileno()))).get(key)
            if entry is not None and entry.shape == self._shapes[name]:
                return map_tensor(opened, entry)
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(key)  # type: ignore[no-any-return]

    def _entries_of(self, file: Path, version: _Version) -> dict[str, Entry]:
        """Return where the tensors of a file lie, read once; empty if its header is one that only the library reads.

        The library reads the header again for every tensor, which for one of thousands takes longer than the tensors.
        """
        known = self._entries.get(file)
        if known is None or known[0] != version:  # not read yet, or another file by now
            try:
                known = version, {entry.name: entry for entry in read_header(file).entries}
            except ValueError:
                known = version, {}
            if _version(os.stat(file)) != version:  # exchanged meanwhile: the library opens what is there
                return {}
            self._entries[file] = known
        return known[1]


def _version(status: os.stat_result) -> _Version:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _DistributedAnchor(Anchor):
    """A ``torch.distributed.checkpoint`` folder."""

    def __init__(self, path: Path) -> None:
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
    if path.name == METADATA:
        return _DistributedAnchor(path.parent)
    if path.suffix == ".safetensors":
        return _SafetensorsAnchor([path], str(path))
    if path.suffix in _PICKLED:
        return _open_checkpoint(path)
    raise ValueError(
        f"Expected the anchor {str(path)!r} to be a directory, a .safetensors file or one of {', '.join(_PICKLED)} "
        f"but its name ends in {path.suffix!r}."
    )


def _open_directory(path: Path) -> Anchor:
    if (path / METADATA).is_file() and not _is_hugging_face(path):
        return _DistributedAnchor(path)
    files = weight_files(path)
    if files is None:
        raise ValueError(
            f"Expected {SINGLE} or {INDEX} in {str(path)!r} but found {listing(os.listdir(path))}. "
            "Save the base with `save_pretrained`, which writes safetensors."
        )
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    return _SafetensorsAnchor(
        [path / name for name in files.names], str(path), config, _ends(path, config or {})
    )


def _ends(path: Path, config: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a response, as the files of a directory name them; none if those are malformed."""
    try:
        generation = read_json(path / GENERATION) if (path / GENERATION).is_file() else None
    except ValueError:
        return []
    return [end for end in config_end_tokens(config, generation) or [] if type(end) is int]


def _is_hugging_face(path: Path) -> bool:
    """Whether a directory has what Hugging Face's have: its ``.metadata`` is then never looked at."""
    ends = (".safetensors", ".safetensors.index.json")
    return any(name == "config.json" or name.endswith(ends) for name in os.listdir(path))


def _open_checkpoint(path: Path) -> Anchor:
    try:
        archive = zipfile.is_zipfile(path)  # what `torch.save` wrote before 1.6 cannot be mapped
        if archive:
            check_stored(path, path.stat().st_size)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} could not be read with `weights_only=True` ({_reason(error)}). Files that need "
            "unpickling are refused: save the weights alone, as safetensors or as a state dict."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise ValueError(f"Expected {str(path)!r} to hold a state dict but got {type(state).__name__}.")
    return _TensorAnchor(state, str(path))


def _reason(error: Exception) -> str:
    """Return what PyTorch found, without its advice to run what the file holds, and without its colours."""
    text = str(error)
    found = text.partition("WeightsUnpickler error: ")[2].split(". ")[0]
    return printable(found.strip() or f"{type(error).__name__}: {text}")[:300]
