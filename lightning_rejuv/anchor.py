"""The anchor: the checkpoint that a model is pulled back toward, read tensor by tensor."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_rejuv.names import bridge, canonical_name, listing

AnchorSource: TypeAlias = "Anchor | nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]"

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")


class Anchor(ABC):
    """A checkpoint's tensors by canonical name, each read only when it is asked for.

    Use :meth:`Anchor.open`; any checkpoint may be the anchor: the pretrained base, or an earlier epoch.

    >>> anchor = Anchor.open({"weight": torch.ones(2, 3)})
    >>> anchor.names(), tuple(anchor.shape("weight"))
    (['weight'], (2, 3))
    """

    @staticmethod
    def open(source: AnchorSource) -> Anchor:
        """Open whatever holds the anchor's weights.

        Args:
            source: a module; a state dict; a Hugging Face directory (``model.safetensors``, sharded or
                not); a ``torch.distributed.checkpoint`` folder; a ``.safetensors`` file; a Lightning
                checkpoint or another file that ``torch.load(weights_only=True)`` can read. Files are
                memory-mapped.

        Raises:
            FileNotFoundError: the path, or a shard that its index names, does not exist.
            ValueError: the path holds no weights that can be read safely.
            TypeError: ``source`` is none of the above.
        """
        if isinstance(source, Anchor):
            return source
        if isinstance(source, nn.Module):
            return _TensorAnchor(dict(source.named_parameters(remove_duplicate=False)), "the given module")
        if isinstance(source, Mapping):
            return _TensorAnchor(source, "the given state dict")
        if isinstance(source, (str, os.PathLike)):
            return _open_path(Path(source))
        raise TypeError(
            "Expected the anchor to be a module, a state dict or a path "
            f"but got {type(source).__name__}. Pass for example the directory of the base model."
        )

    @property
    @abstractmethod
    def description(self) -> str:
        """Where the tensors come from, for messages and reports."""

    @abstractmethod
    def names(self) -> list[str]:
        """All tensors' canonical names."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, without reading the tensor."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor, on the device where it lies (the CPU for files). Never to be written to."""


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

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class _SafetensorsAnchor(Anchor):
    """One or more safetensors files; only the header is read until a tensor is asked for."""

    def __init__(self, files: list[Path], description: str) -> None:
        self._description = description
        self._place: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, torch.Size] = {}
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 (not a mapping)
                    name = canonical_name(key)
                    self._place[name] = (file, key)
                    self._shapes[name] = torch.Size(handle.get_slice(key).get_shape())

    @property
    def description(self) -> str:
        return self._description

    def names(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        file, key = self._place[name]
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(key)  # type: ignore[no-any-return]


class _DistributedAnchor(Anchor):
    """A ``torch.distributed.checkpoint`` folder."""

    def __init__(self, path: Path) -> None:
        from lightning_rejuv.anchor_dcp import DistributedCheckpoint  # importing it takes over a second

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
    if path.suffix == ".safetensors":
        return _SafetensorsAnchor([path], str(path))
    if path.suffix in _PICKLED:
        return _open_checkpoint(path)
    raise ValueError(
        f"Expected the anchor {str(path)!r} to be a directory, a .safetensors file or one of "
        f"{', '.join(_PICKLED)} but its name ends in {path.suffix!r}."
    )


def _open_directory(path: Path) -> Anchor:
    if (path / ".metadata").is_file():
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


def match(model: nn.Module, anchor: Anchor, resizable: Collection[str] = frozenset()) -> dict[str, str]:
    """Match every parameter of a model with the anchor's tensor of the same meaning.

    Wrapper prefixes and one common root (a LightningModule's attribute) are bridged; a tied parameter
    may stand in the anchor under any of its names, once or more.

    Args:
        model: the model to be edited.
        anchor: its anchor.
        resizable: parameters whose number of rows may differ: the tables of a resized vocabulary.

    Returns:
        The anchor's name of every parameter, by the name that ``model.named_parameters()`` gives it.

    Raises:
        ValueError: names or shapes differ (both lists are printed), or the anchor holds two different
            tensors where the model ties them.

    >>> net = nn.Linear(2, 2)
    >>> match(net, Anchor.open({"net.weight": torch.eye(2), "net.bias": torch.zeros(2)}))
    {'weight': 'net.weight', 'bias': 'net.bias'}
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(canonical_name(name))
    available = set(anchor.names())
    rename = bridge(list(aliases.values()), available)
    if rename is None:
        ours = {name for names in aliases.values() for name in names}
        raise ValueError(
            f"The model and its anchor ({anchor.description}) do not hold the same parameters. Only in the "
            f"model: {listing(ours - available)}. Only in the anchor: {listing(available - ours)}."
        )
    found: dict[str, str] = {}
    used = {rename(canonical_name(name)) for name, _ in model.named_buffers()}
    for name, parameter in model.named_parameters():
        present = [c for c in map(rename, aliases[id(parameter)]) if c in available]
        _check_alike(name, parameter, present, anchor, name in resizable)
        found[name] = present[0]
        used.update(present)
    root = rename("")
    extra = {name for name in available - used if name.startswith(root)}
    if extra:
        raise ValueError(
            f"The anchor ({anchor.description}) holds tensors that the model does not have: "
            f"{listing(extra)}. The model's parameters are {listing(found)}."
        )
    return found


def _check_alike(name: str, parameter: Tensor, present: list[str], anchor: Anchor, resizable: bool) -> None:
    first = int(resizable)
    shapes = {candidate: tuple(anchor.shape(candidate)) for candidate in present}
    wrong = {c: s for c, s in shapes.items() if s[first:] != tuple(parameter.shape)[first:]}
    if wrong:
        raise ValueError(
            f"Expected the anchor's tensor for {name!r} to have shape {tuple(parameter.shape)} but got "
            f"{wrong} from {anchor.description}. Where SFT resized the vocabulary, pass "
            "`resize_vocabulary=True`."
        )
    for other in present[1:]:
        if not torch.equal(anchor.tensor(present[0]), anchor.tensor(other)):
            raise ValueError(
                f"The model ties {present} but the anchor ({anchor.description}) holds different tensors for "
                "them. Untie the model, or anchor it to a checkpoint that ties them too."
            )
