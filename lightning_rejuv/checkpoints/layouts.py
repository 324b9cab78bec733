"""Two checkpoints of one model that stand on disk under other names or in other layouts.

One may have the names of the hub and the other those of the model in memory, as the consolidation of a sharded run
writes them; transformers loads both. Each tensor of the SFT model is found by what it becomes in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.anchor.conversion import Source, sources
from lightning_rejuv.checkpoints.checkpoint import Checkpoint, Read
from lightning_rejuv.checkpoints.disk_names import to_disk_layout
from lightning_rejuv.checkpoints.header import Entry


@dataclass(frozen=True)
class Loaded:
    """Names that two checkpoints have in common.

    Attributes:
        ours: the common name of every tensor of the SFT model, by its name on disk.
        theirs: the base's name on disk, by the common name.
        base: the base, with tensors that are put together from those in its files.
    """

    ours: dict[str, str]
    theirs: dict[str, str]
    base: Checkpoint


def names_once_loaded(model: Any, sft: Checkpoint, base: Checkpoint) -> Loaded:
    """Find the names that two checkpoints have in common once transformers has loaded them.

    Args:
        model: their architecture, on the meta device.
        sft: the SFT model.
        base: the base; what it holds in another layout is put into the SFT model's when it is read.

    Raises:
        ValueError: tensors on disk that belong together do not fit together.
    """
    parts = {source.target: source for source in sources(model, base.place)}
    made = _Made(base)
    ours: dict[str, str] = {}
    theirs: dict[str, str] = {}
    done = set()
    for source in sources(model, sft.place):
        if source.converter is None:
            ours[source.names[0]] = source.target
            continue
        common = [f"{source.target} ({number})" for number in range(len(source.names))]
        ours |= dict(zip(source.names, common, strict=True))
        other = parts.get(source.target)
        if other is not None and other.patterns == source.patterns:
            done.add(source.target)
            theirs |= dict(zip(common, other.names, strict=True))
        else:
            inside = source.tensors(_without_memory(sft)).keys()
            found = made.add(source, _taken_apart(model, source, [parts.get(name) for name in inside]))
            theirs |= found
            done |= inside if found else set()
    for source in parts.values():
        if source.target in done:
            continue
        if source.converter is None:
            theirs[source.target] = source.names[0]
        else:
            theirs |= made.add(source, source.tensors)
    return Loaded(ours, theirs, made.checkpoint())


def _taken_apart(
    model: Any, ours: Source, inside: list[Source | None]
) -> Callable[[Read], dict[str, Tensor]]:
    """Make what the SFT model holds apart from what the base holds as it is in memory, by the common names."""

    def make(read: Read) -> dict[str, Tensor]:
        whole = [source for source in inside if source is not None and source.converter is None]
        if len(whole) < len(inside):
            return {}
        apart = to_disk_layout(model, {source.target: read(source.names[0]) for source in whole})
        same = next((s for s in sources(model, apart) if s.target == ours.target), None)
        if same is None or same.patterns != ours.patterns:
            return {}
        return {f"{ours.target} ({number})": apart[name] for number, name in enumerate(same.names)}

    return make


class _Made:
    """Tensors that the base holds in another layout, each made when it is read."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._entries: dict[str, Entry] = {}
        self._makers: dict[str, Callable[[Read], Tensor]] = {}
        self._held: tuple[Source | None, Mapping[str, Tensor]] = (None, {})

    def checkpoint(self) -> Checkpoint:
        """Return the base with what is made."""
        place = {**self._base.place, **{name: ("", entry) for name, entry in self._entries.items()}}
        return replace(self._base, place=place, made=self._makers)

    def add(self, key: Source, make: Callable[[Read], Mapping[str, Tensor]]) -> dict[str, str]:
        """Add what is made together; return its names among the base's, by the common names."""
        names = {}
        dtypes: list[torch.dtype] = []

        def blank(name: str) -> Tensor:
            dtypes.append(self._base.entry(name).dtype)
            return _without_memory(self._base)(name)

        def maker(name: str) -> Callable[[Read], Tensor]:
            def one(read: Read) -> Tensor:
                if self._held[0] is not key:  # what comes from the same parts is asked for next
                    self._held = (key, {n: tensor.contiguous() for n, tensor in make(read).items()})
                return self._held[1][name]

            return one

        for name, tensor in make(blank).items():
            names[name] = f"{name}, as loaded"
            self._entries[names[name]] = Entry(names[name], dtypes[0], tuple(tensor.shape), 0)
            self._makers[names[name]] = maker(name)
        return names


def _without_memory(checkpoint: Checkpoint) -> Read:
    return lambda name: torch.empty(
        checkpoint.entry(name).shape, dtype=checkpoint.entry(name).dtype, device="meta"
    )
