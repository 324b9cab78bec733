"""Which tensor of an anchor stands for which parameter of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lightning_rejuv.anchor.anchor import Anchor
from lightning_rejuv.names import bridge, canonical_name, listing


def match(
    model: nn.Module,
    anchor: Anchor,
    resizable: Collection[str] = frozenset(),
    shapes: Mapping[str, torch.Size] | None = None,
) -> dict[str, str]:
    """Match every parameter of a model with the anchor's tensor of the same meaning.

    Wrapper prefixes and one common root (a LightningModule's attribute) are bridged; a tied parameter
    may stand in the anchor under any of its names, once or more.

    Args:
        model: the model to be edited.
        anchor: its anchor.
        resizable: parameters whose number of rows may differ: the tables of a resized vocabulary.
        shapes: of the whole parameters, where the model holds shards, by the names to be matched.

    Returns:
        The anchor's name of every parameter, by the name that ``model.named_parameters()``, or
        ``shapes``, gives it.

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
            f"model: {listing(ours - available)}. Only in the anchor: {listing(available - ours)}. A LightningModule "
            "with more in it than the model says which one that is: by an attribute `language_model`."
        )
    found: dict[str, str] = {}
    used = {rename(canonical_name(name)) for name, _ in model.named_buffers()}
    for name, parameter in model.named_parameters():
        name = name if shapes is None or name in shapes else canonical_name(name)
        present = [c for c in map(rename, aliases[id(parameter)]) if c in available]
        shape = parameter.shape if shapes is None else shapes[name]
        _check_alike(name, shape, present, anchor, name in resizable)
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


def _check_alike(name: str, shape: torch.Size, present: list[str], anchor: Anchor, resizable: bool) -> None:
    first = int(resizable)
    shapes = {candidate: tuple(anchor.shape(candidate)) for candidate in present}
    wrong = {c: s for c, s in shapes.items() if s[first:] != tuple(shape)[first:]}
    if wrong:
        raise ValueError(
            f"Expected the anchor's tensor for {name!r} to have shape {tuple(shape)} but got "
            f"{wrong} from {anchor.description}. Where SFT resized the vocabulary, pass "
            "`resize_vocabulary=True`."
        )
    for other in present[1:]:
        if not torch.equal(anchor.tensor(present[0]), anchor.tensor(other)):
            raise ValueError(
                f"The model ties {present} but the anchor ({anchor.description}) holds different tensors for "
                "them. Untie the model, or anchor it to a checkpoint that ties them too."
            )
