"""Floating buffers that fusion moves along with the parameters: running statistics, a router's correction bias.

What a module registers as persistent is part of what was trained, and a checkpoint on disk does not say which of its
tensors are buffers: both ways fuse the same. Constants that are computed (``inv_freq``) are not persistent, and
integers are counts: both stay the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import persistent_buffers, wraps_others
from lightning_rejuv.anchor import Anchor
from lightning_rejuv.names import canonical_name, listing

_STATISTICS = (".running_mean", ".running_var")


@dataclass(frozen=True)
class Buffers:
    """The persistent floating buffers of a model; every process holds them whole.

    Attributes:
        fused: those that the anchor holds too, by name without the parts that wrappers put into it.
        anchor_names: the anchor's name of each of them.
        kept: names of those that the anchor does not hold; they stay the model's.
        statistics: layers with running statistics of their input, which a fusion can only approximate.
    """

    fused: Mapping[str, Tensor] = field(default_factory=dict)
    anchor_names: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()


def find_buffers(model: nn.Module, anchor: Anchor | None, name_there: Callable[[str], str]) -> Buffers:
    """Find which buffers of a model are to be fused.

    Args:
        model: the model.
        anchor: where the base's buffers are looked up; None if there is no anchor.
        name_there: from a buffer's name to the name that it has in the anchor.
    """
    fused: dict[str, Tensor] = {}
    anchor_names: dict[str, str] = {}
    kept: list[str] = []
    available = set(anchor.names()) if anchor else set()
    for wrapped_name, buffer in persistent_buffers(model):
        if not buffer.is_floating_point():
            continue
        name = canonical_name(wrapped_name)
        other = name_there(name)
        fits = anchor is not None and other in available and anchor.shape(other) == buffer.shape
        if fits and not wraps_others(buffer):
            fused[name], anchor_names[name] = buffer, other
        else:
            kept.append(name)
    statistics = dict.fromkeys(
        name.rpartition(".")[0] for name in (*fused, *kept) if f".{name}".endswith(_STATISTICS)
    )
    return Buffers(fused, anchor_names, tuple(kept), tuple(statistics))


def beside(parameters: Mapping[str, str]) -> Callable[[str], str]:
    """Return a renaming for tensors that lie in the same modules as parameters whose names in the anchor are known.

    Args:
        parameters: from a parameter's name to the anchor's.

    >>> name_there = beside({"norm.weight": "net.norm.weight", "head.weight": "net.head.weight"})
    >>> name_there("norm.running_mean")
    'net.norm.running_mean'
    """
    heads = {}
    for name, anchor_name in parameters.items():
        a, b = canonical_name(name).split("."), anchor_name.split(".")
        while a and b and a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        heads[canonical_name(name)] = (a, b)

    def name_there(name: str) -> str:
        parts = name.split(".")

        def shared(other: str) -> int:
            pairs = zip(parts, other.split("."), strict=False)
            return next(
                (i for i, (a, b) in enumerate(pairs) if a != b), min(len(parts), other.count(".") + 1)
            )

        a, b = heads[max(heads, key=shared)]
        return ".".join([*b, *parts[len(a) :]]) if parts[: len(a)] == a else name

    return name_there


@torch.no_grad()
def check_finite_buffers(buffers: Buffers, anchor_of: Callable[[str], Tensor], description: str) -> None:
    """Refuse NaN and infinity, which a fusion would spread.

    Raises:
        ValueError: with the names of the buffers.
    """
    values = {"model": lambda name: buffers.fused[name], f"anchor ({description})": anchor_of}
    for whose, value in values.items():
        wrong = [name for name in buffers.fused if not bool(value(name).isfinite().all())]
        if wrong:
            raise ValueError(
                f"Expected finite buffers but the {whose} holds NaN or infinity in {listing(wrong)}."
            )
