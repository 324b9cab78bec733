"""Which tensor of an anchor stands for which parameter of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from lightning_rejuv._compat import is_hugging_face, language_model
from lightning_rejuv.anchor.anchor import Anchor
from lightning_rejuv.anchor.config import ties
from lightning_rejuv.anchor.tensors import is_embedding, is_head, not_of_the_model
from lightning_rejuv.names import Rename, bridges, canonical_name, listing


def match(
    model: nn.Module,
    anchor: Anchor,
    resizable: Collection[str] = frozenset(),
    shapes: Mapping[str, torch.Size] | None = None,
) -> dict[str, str]:
    """Match every parameter of a model with the anchor's tensor of the same meaning.

    Wrapper prefixes and one common root (a LightningModule's attribute) are bridged; a tied parameter
    may stand in the anchor under any of its names, once or more. A head that the anchor's config ties to its
    embedding is that embedding. Constants that older releases stored, and modules for multi-token prediction,
    may stand in the anchor alone.

    Args:
        model: the model to be edited.
        anchor: its anchor; one on disk as :meth:`Anchor.read_as` gives it for the model.
        resizable: parameters whose number of rows may differ: the tables of a resized vocabulary.
        shapes: the shapes of the whole parameters, by the names to be matched, if the model holds shards.

    Returns:
        The anchor's name of every parameter, by the name that ``model.named_parameters()``, or
        ``shapes``, gives it.

    Raises:
        ValueError: names or shapes differ (both lists are printed), the anchor holds several models, or two
            different tensors that the model ties.

    >>> net = nn.Linear(2, 2)
    >>> match(net, Anchor.open({"net.weight": torch.eye(2), "net.bias": torch.zeros(2)}))
    {'weight': 'net.weight', 'bias': 'net.bias'}
    """
    aliases = _aliases(model)
    sizes: dict[int, tuple[torch.Size, bool]] = {}
    known: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        name = name if shapes is None or name in shapes else canonical_name(name)
        known[name] = id(parameter)
        shape = parameter.shape if shapes is None else shapes[name]
        sizes[id(parameter)] = (shape, name in resizable)
    available = set(anchor.names())
    tied = _tied_heads(aliases.values(), anchor)
    fitting = bridges([[*names, *tied.get(names[0], ())] for names in aliases.values()], available)
    if not fitting:
        raise ValueError(_nothing_fits(model, anchor, {n for names in aliases.values() for n in names}))

    def present(key: int, rename: Rename) -> list[str]:
        own = [name for name in map(rename, aliases[key]) if name in available]
        return own or [n for n in map(rename, tied.get(aliases[key][0], ())) if n in available][:1]

    def fits(rename: Rename) -> bool:
        return all(
            anchor.shape(name)[int(resizable) :] == shape[int(resizable) :]
            for key, (shape, resizable) in sizes.items()
            for name in present(key, rename)
        )

    whole = [rename for rename in fitting if fits(rename)]
    _check_one_model(anchor, [[present(key, rename)[0] for key in sizes] for rename in whole], whole)
    rename = (whole or fitting)[0]
    found: dict[str, str] = {}
    used = {rename(canonical_name(name)) for name, _ in model.named_buffers()}
    for name, key in known.items():
        candidates = present(key, rename)
        _check_alike(name, sizes[key][0], candidates, anchor, sizes[key][1])
        found[name] = candidates[0]
        used.update(candidates)
    root = rename("")
    extra = {name for name in available - used if name.startswith(root)}
    extra -= not_of_the_model(extra, used, anchor.config)
    if extra:
        raise ValueError(
            f"The anchor ({anchor.description}) holds tensors that the model does not have: "
            f"{listing(extra)}. The model's parameters are {listing(found)}."
        )
    return found


def names_fit(model: nn.Module, anchor: Anchor) -> bool:
    """Whether an anchor has a tensor for every parameter of a model, by the names as they are."""
    return bool(bridges(list(_aliases(model).values()), set(anchor.names())))


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """Return every parameter's canonical names: one, or several if it is tied."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(canonical_name(name))
    return aliases


def _tied_heads(aliases: Collection[Sequence[str]], anchor: Anchor) -> dict[str, list[str]]:
    """Return the names of the embedding that the anchor's config ties to each head that the model does not tie."""
    if anchor.config is None or ties(anchor.config) is False:
        return {}
    embeddings = [name for names in aliases for name in names if is_embedding(name)]
    return {
        names[0]: embeddings
        for names in aliases
        if all(is_head(name) for name in names) and not any(is_embedding(name) for name in names)
    }


def _nothing_fits(model: nn.Module, anchor: Anchor, wanted: set[str]) -> str:
    available = set(anchor.names())
    text = (
        f"The model and its anchor ({anchor.description}) do not hold the same parameters. Only in the "
        f"model: {listing(wanted - available)}. Only in the anchor: {listing(available - wanted)}."
    )
    inner = language_model(model)
    if not is_hugging_face(inner) and any(names_fit(child, anchor) for child in model.children()):
        return (
            f"{text} A LightningModule with more in it than the model says which one that is: by an attribute "
            "`language_model`."
        )
    if is_hugging_face(inner) and anchor.config is not None:
        return (
            f"{text} If it is the model's base in another layout, pass it as a module, loaded with "
            f"`{type(inner).__name__}.from_pretrained`."
        )
    return text


def _check_one_model(anchor: Anchor, places: list[list[str]], renames: list[Rename]) -> None:
    """Refuse an anchor that holds several models of this architecture, unless they are equal."""
    for other in places[1:]:
        if all(a == b or _equal(anchor, a, b) for a, b in zip(places[0], other, strict=True)):
            continue
        prefixes = sorted(found.added for found in renames)
        raise ValueError(
            f"Expected the anchor ({anchor.description}) to hold one model but it holds several whose tensors differ: "
            f"their names begin with {listing(prefixes)}. Say which one is meant: "
            f"`Anchor.open(…, prefix={prefixes[-1]!r})`, or the path with `::{prefixes[-1]}` at its end."
        )


def _equal(anchor: Anchor, one: str, two: str) -> bool:
    first, second = anchor.tensor(one), anchor.tensor(two)
    return first is second or (first.dtype == second.dtype and torch.equal(first, second))


def _check_alike(name: str, shape: torch.Size, present: list[str], anchor: Anchor, resizable: bool) -> None:
    first = int(resizable)
    shapes = {candidate: tuple(anchor.shape(candidate)) for candidate in present}
    wrong = {c: s for c, s in shapes.items() if s[first:] != tuple(shape)[first:]}
    if wrong:
        raise ValueError(
            f"Expected the anchor's tensor for {name!r} to have shape {tuple(shape)} but got {wrong} from "
            f"{anchor.description}. If SFT resized the vocabulary, pass `resize_vocabulary=True`."
        )
    for other in present[1:]:
        if not torch.equal(anchor.tensor(present[0]), anchor.tensor(other)):
            raise ValueError(
                f"The model ties {present} but the anchor ({anchor.description}) holds different tensors for "
                "them. Untie the model, or anchor it to a checkpoint that ties them too."
            )
