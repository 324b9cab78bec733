"""What the tensors of two checkpoints have in common: their names, whatever wrappers and releases made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_rejuv.anchor.config import ties
from lightning_rejuv.anchor.tensors import is_constant, is_embedding, is_head
from lightning_rejuv.checkpoints.checkpoint import Checkpoint
from lightning_rejuv.checkpoints.header import Header
from lightning_rejuv.names import Rename, bridge, canonical_name, listing

_DATA_PARALLEL = "module."


@dataclass(frozen=True)
class Common:
    """Names that an SFT model and its base have in common.

    Attributes:
        sft: the SFT model, under names that load.
        base: the base, with tensors that are put together from those in its files.
        ours: the common name of every tensor of the SFT model, by its name in ``sft``.
        theirs: the name in ``base``, by the common name.
        wanted: for every floating-point tensor of the SFT model the common names under which the base may hold it.
        warnings: what was renamed, and why.
    """

    sft: Checkpoint
    base: Checkpoint
    ours: dict[str, str]
    theirs: dict[str, str]
    wanted: dict[str, list[str]]
    warnings: tuple[str, ...] = ()


def common_names(sft: Checkpoint, base: Checkpoint) -> Common:
    """Find the names that two checkpoints have in common.

    Raises:
        ValueError: they do not hold the same tensors; both lists are printed.
    """
    for strip in (_unwrapped, _out_of_data_parallel):
        ours, theirs = strip(sft.place), {new: old for old, new in strip(base.place).items()}
        wanted = _wanted(sft, base, ours)
        rename = _bridge(wanted, theirs)
        if rename is not None:
            common = {name: rename(plain) for name, plain in ours.items()}
            found = Common(sft, base, common, theirs, {n: [*map(rename, a)] for n, a in wanted.items()})
            return _under_names_that_load(found, ours, rename)
    loaded = _by_loading(sft, base)
    if loaded is not None:
        return loaded
    mine, others = {*_wanted(sft, base, _unwrapped(sft.place))}, set(base.place)
    raise ValueError(
        f"The SFT model and the base do not hold the same tensors. Only in {str(sft.path)!r}: "
        f"{listing(mine - others)}. Only in {str(base.path)!r}: {listing(others - mine)}. Pass the "
        "checkpoint that SFT started from; merge adapters and remove added heads first. If the two were saved by "
        "different releases or tools, load each with transformers and save it again with `save_pretrained`."
    )


def _wanted(sft: Checkpoint, base: Checkpoint, names: Mapping[str, str]) -> dict[str, list[str]]:
    """A head may stand for the base's embedding, unless the base says that it has a head of its own."""
    embeddings = (
        [new for new in names.values() if is_embedding(new)] if ties(base.config) is not False else []
    )
    return {
        name: [new, *(embeddings if is_head(new) else [])]
        for name, new in names.items()
        if sft.entry(name).dtype.is_floating_point
    }


def _bridge(wanted: Mapping[str, list[str]], theirs: Mapping[str, str]) -> Rename | None:
    return bridge([aliases for aliases in wanted.values() if not is_constant(aliases[0])], theirs.keys())


def _by_loading(sft: Checkpoint, base: Checkpoint) -> Common | None:
    model = _skeleton(sft)
    if model is None:
        return None
    from lightning_rejuv.checkpoints.layouts import names_once_loaded

    try:
        loaded = names_once_loaded(model, sft, base)
    except ValueError:
        return None
    wanted = _wanted(sft, base, loaded.ours)
    if _bridge(wanted, loaded.theirs) is None:
        return None
    return Common(sft, loaded.base, loaded.ours, loaded.theirs, wanted)


def _under_names_that_load(found: Common, plain: Mapping[str, str], rename: Rename) -> Common:
    """Rename the SFT model where transformers would load nothing from it: the output has to load."""
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
        ours={names[name]: common for name, common in found.ours.items()},
        wanted={names[name]: aliases for name, aliases in found.wanted.items()},
        warnings=(text,),
    )


def _skeleton(checkpoint: Checkpoint) -> Any | None:
    """Return the model that transformers makes of a checkpoint's config; None where it makes none."""
    from lightning_rejuv.checkpoints.skeleton import skeleton

    try:
        return skeleton(checkpoint.path)
    except (ImportError, ValueError):
        return None


def _loads(checkpoint: Checkpoint, names: list[str]) -> bool | None:
    """Whether transformers finds every tensor under these names; None where it does not know the model."""
    if all(name.startswith(_DATA_PARALLEL) for name in names):
        return False
    model = _skeleton(checkpoint)
    if model is None:
        return None
    from lightning_rejuv.checkpoints.skeleton import loads

    # transformers looks past a second prefix (`model.model.layers…`, from an attribute `model`); no other loader does.
    prefix, there = f"{model.base_model_prefix}.", model.state_dict().keys()
    if any(n not in there and n.startswith(prefix) and n.removeprefix(prefix) in there for n in names):
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
    """Without the ``module`` that data parallelism puts around a model, or around one part of it."""
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
