"""The names that two checkpoints have in common, whatever wrappers, releases and other layouts made of them.

One checkpoint may have the names of the hub and the other those of the model in memory, as the consolidation of a
sharded run writes them; transformers loads both. Each tensor is then found by what it becomes in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.anchor.config import ties
from lightning_rejuv.anchor.conversion import Source, sources
from lightning_rejuv.anchor.header import Entry, Header
from lightning_rejuv.anchor.tensors import is_constant, is_embedding, is_head
from lightning_rejuv.checkpoints.models import loads, names_on_disk, skeleton_if_known, to_disk_layout
from lightning_rejuv.checkpoints.reader import Checkpoint, Read
from lightning_rejuv.checkpoints.tying import tied_embedding
from lightning_rejuv.names import Rename, bridge, canonical_name, listing

_DATA_PARALLEL = "module."


@dataclass(frozen=True)
class CommonNames:
    """Names that an SFT model and its base have in common.

    Attributes:
        sft: the SFT model, under names that load.
        base: the base, with tensors that are put together from those in its files.
        of_sft: the common name of every tensor of the SFT model, by its name in ``sft``.
        in_base: the name in ``base``, by the common name.
        wanted: for every floating-point tensor of the SFT model the common names under which the base may hold it.
        warnings: what was renamed, and why.
    """

    sft: Checkpoint
    base: Checkpoint
    of_sft: dict[str, str]
    in_base: dict[str, str]
    wanted: dict[str, list[str]]
    warnings: tuple[str, ...] = ()


def common_names(sft: Checkpoint, base: Checkpoint) -> CommonNames:
    """Find the names that two checkpoints have in common.

    Raises:
        ValueError: they do not hold the same tensors; the message prints both lists.
    """
    for strip in (_unwrapped, _out_of_data_parallel):
        plain, in_base = strip(sft.place), {new: old for old, new in strip(base.place).items()}
        wanted = _wanted(sft, base, plain)
        rename = _bridge(wanted, in_base)
        if rename is not None:
            of_sft = {name: rename(new) for name, new in plain.items()}
            renamed = {name: [*map(rename, aliases)] for name, aliases in wanted.items()}
            return _under_names_that_load(CommonNames(sft, base, of_sft, in_base, renamed), plain, rename)
    loaded = _common_once_loaded(sft, base)
    if loaded is not None:
        return loaded
    sft_only, base_only = {*_wanted(sft, base, _unwrapped(sft.place))}, set(base.place)
    raise ValueError(
        f"The SFT model and the base do not hold the same tensors. Only in {str(sft.path)!r}: "
        f"{listing(sft_only - base_only)}. Only in {str(base.path)!r}: {listing(base_only - sft_only)}. Pass the "
        "checkpoint that SFT started from; merge adapters and remove added heads first. If the two were saved by "
        "different releases or tools, load each with transformers and save it again with `save_pretrained`."
    )


def base_names(names: list[str], base: Checkpoint) -> dict[str, str]:
    """Return the base's names on disk of some of the model's parameters; a tied head's is its embedding's.

    Raises:
        ValueError: the base's files hold a parameter in another layout, or do not hold it.
    """
    embedding = tied_embedding(base) if any(map(is_head, names)) else None
    wanted = [name for name in names if not (embedding and is_head(name))]
    rename: Callable[[str], str] | None = bridge([[name] for name in wanted], base.place.keys())
    if wanted and rename is None:
        loaded = names_on_disk(base)
        rename = loaded.__getitem__ if all(name in loaded for name in wanted) else None
    if wanted and rename is None:
        missing = [name for name in wanted if name not in base.place]
        raise ValueError(
            f"Expected the base {str(base.path)!r} to hold {listing(missing)} but its tensors are "
            f"{listing(base.place)}. If it stores them in another layout, merge the adapter with PEFT and pass the "
            "merged model; if it is another model, pass the one that the adapter was trained on."
        )
    return {name: rename(name) if rename and name in wanted else str(embedding) for name in names}


def _wanted(sft: Checkpoint, base: Checkpoint, plain: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names under which the base may hold each floating-point tensor.

    A head may stand for the base's embedding, unless the base says that it has a head of its own.
    """
    embeddings = (
        [new for new in plain.values() if is_embedding(new)] if ties(base.config) is not False else []
    )
    return {
        name: [new, *(embeddings if is_head(new) else [])]
        for name, new in plain.items()
        if sft.entry(name).dtype.is_floating_point
    }


def _bridge(wanted: Mapping[str, list[str]], in_base: Mapping[str, str]) -> Rename | None:
    return bridge([aliases for aliases in wanted.values() if not is_constant(aliases[0])], in_base.keys())


def _under_names_that_load(found: CommonNames, plain: Mapping[str, str], rename: Rename) -> CommonNames:
    """Rename the SFT model if transformers would load nothing from it: the output has to load."""
    names = dict(plain)
    if rename.removed:
        fits = _loads(found.sft, list(plain.values()))
        if fits is None:
            text = f"the SFT model's names begin with {rename.removed!r} and the base's do not: the output keeps them"
            found = replace(found, warnings=(text,))
        if fits is False:
            names = {name: rename(new) for name, new in plain.items()}
    if all(old == new for old, new in names.items()):
        return found
    old, new = next((a, b) for a, b in names.items() if a != b)
    text = f"the SFT model's names do not load as they are (as {old!r}): the output has the base's ({new!r})"
    return replace(
        found,
        sft=_renamed(found.sft, names),
        of_sft={names[name]: common for name, common in found.of_sft.items()},
        wanted={names[name]: aliases for name, aliases in found.wanted.items()},
        warnings=(text,),
    )


def _loads(checkpoint: Checkpoint, names: list[str]) -> bool | None:
    """Tell whether transformers finds every tensor under these names; None if it does not know the model."""
    if all(name.startswith(_DATA_PARALLEL) for name in names):
        return False
    model = skeleton_if_known(checkpoint.path)
    if model is None:
        return None
    # transformers looks past a second prefix (`model.model.layers…`, from an attribute `model`); no other loader does.
    prefix, known = f"{model.base_model_prefix}.", model.state_dict().keys()
    if any(n not in known and n.startswith(prefix) and n.removeprefix(prefix) in known for n in names):
        return False
    return not loads(model, checkpoint, names)["missing"]


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    shards = {
        file: Header(
            tuple(replace(entry, name=names[entry.name]) for entry in header.entries),
            header.metadata,
            header.size,
        )
        for file, header in checkpoint.shards.items()
    }
    place = {
        names[name]: (file, replace(entry, name=names[name]))
        for name, (file, entry) in checkpoint.place.items()
    }
    index = checkpoint.index
    if index is not None:
        index = {**index, "weight_map": {names[n]: file for n, file in index["weight_map"].items()}}
    return replace(checkpoint, shards=shards, place=place, index=index, renamed=True)


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    return {name: canonical_name(name) for name in names}


def _out_of_data_parallel(names: Iterable[str]) -> dict[str, str]:
    """Return names without the ``module`` that data parallelism puts around a model, or around one part of it."""
    plain = _unwrapped(names)
    while True:
        roots = {new.partition(".")[0] for new in plain.values()}
        inside = {
            root: all(
                new.partition(".")[2].startswith(_DATA_PARALLEL)
                for new in plain.values()
                if new.startswith(root + ".")
            )
            for root in roots
        }
        shorter = {}
        for name, new in plain.items():
            root, _, rest = new.partition(".")
            if root + "." == _DATA_PARALLEL:
                new = rest
            elif inside[root]:
                new = f"{root}.{rest.removeprefix(_DATA_PARALLEL)}"
            shorter[name] = new
        if shorter == plain:
            return plain
        plain = shorter


def _common_once_loaded(sft: Checkpoint, base: Checkpoint) -> CommonNames | None:
    """Find the names that two checkpoints have in common once transformers has loaded them; None if it cannot."""
    model = skeleton_if_known(sft.path)
    if model is None:
        return None
    try:
        of_sft, in_base, base = _names_once_loaded(model, sft, base)
    except ValueError:
        return None
    wanted = _wanted(sft, base, of_sft)
    return None if _bridge(wanted, in_base) is None else CommonNames(sft, base, of_sft, in_base, wanted)


def _names_once_loaded(
    model: Any, sft: Checkpoint, base: Checkpoint
) -> tuple[dict[str, str], dict[str, str], Checkpoint]:
    """Find the common names from what transformers makes of both.

    Args:
        model: their architecture, on the meta device.
        sft: the SFT model.
        base: the base; what it holds in another layout is put into the SFT model's when it is read.

    Returns:
        The common name of every tensor of the SFT model, the base's name by the common name, and the base with the
        tensors that are put together from those in its files.

    Raises:
        ValueError: tensors on disk that belong together do not fit together.
    """
    parts = {source.target: source for source in sources(model, base.place)}
    made = _MadeTensors(base)
    of_sft: dict[str, str] = {}
    in_base: dict[str, str] = {}
    done = set()
    for source in sources(model, sft.place):
        if source.converter is None:
            of_sft[source.names[0]] = source.target
            continue
        common = [f"{source.target} ({number})" for number in range(len(source.names))]
        of_sft |= dict(zip(source.names, common, strict=True))
        other = parts.get(source.target)
        if other is not None and other.patterns == source.patterns:
            done.add(source.target)
            in_base |= dict(zip(common, other.names, strict=True))
        else:
            inside = source.tensors(_without_memory(sft)).keys()
            found = made.add(source, _split_as(model, source, [parts.get(name) for name in inside]))
            in_base |= found
            done |= inside if found else set()
    for source in parts.values():
        if source.target in done:
            continue
        if source.converter is None:
            in_base[source.target] = source.names[0]
        else:
            in_base |= made.add(source, source.tensors)
    return of_sft, in_base, made.checkpoint()


def _split_as(model: Any, wanted: Source, inside: list[Source | None]) -> Callable[[Read], dict[str, Tensor]]:
    """Return what splits tensors that the base holds as in memory into those that the SFT model holds on disk.

    It gives them by the common names.
    """

    def make(read: Read) -> dict[str, Tensor]:
        whole = [source for source in inside if source is not None and source.converter is None]
        if len(whole) < len(inside):
            return {}
        split = to_disk_layout(model, {source.target: read(source.names[0]) for source in whole})
        same = next((s for s in sources(model, split) if s.target == wanted.target), None)
        if same is None or same.patterns != wanted.patterns:
            return {}
        return {f"{wanted.target} ({number})": split[name] for number, name in enumerate(same.names)}

    return make


class _MadeTensors:
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
        """Add tensors that are made together; return their names among the base's, by the common names."""
        names = {}
        dtypes: list[torch.dtype] = []

        def blank(name: str) -> Tensor:
            dtypes.append(self._base.entry(name).dtype)
            return _without_memory(self._base)(name)

        def maker(name: str) -> Callable[[Read], Tensor]:
            def one(read: Read) -> Tensor:
                if self._held[0] is not key:  # tensors that come from the same parts are asked for next
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
