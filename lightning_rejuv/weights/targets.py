"""Which parameters a fusion edits, and what each of them is pulled toward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_rejuv.adapters import is_adapted
from lightning_rejuv.anchor import Anchor, AnchorSource, match
from lightning_rejuv.forward import device_of
from lightning_rejuv.weights.buffers import Buffers, beside, find_buffers
from lightning_rejuv.weights.drift import Drift, measure_drift
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.lora import lora_targets, name_in_base
from lightning_rejuv.weights.open_layout import open_layout
from lightning_rejuv.weights.refusals import check_anchor, check_apart, check_model, check_unquantised
from lightning_rejuv.weights.shard import Shard


@dataclass(frozen=True)
class Targets:
    """The parameters that a fusion edits.

    Attributes:
        parameters: by name; a tied one once.
        layout: how they are stored; it may hold others beside them.
        anchor_of: gives the anchor's tensor for a parameter's or buffer's name: of its whole shape, or with
            another number of rows if a vocabulary was resized.
        measure: measures how far the model is from its anchor now.
        description: where the anchor comes from.
        pulls: for parameters whose fusion is no lerp of their own (the lengths of DoRA), by name, what fuses
            their layer, given the weight of the SFT model.
        reference: the anchor as a module that can be run in the model's place, if it is one.
        buffers: the floating buffers that are fused like parameters, and those that are not.
        base_ends: the tokens with which the anchor's model ends a response, as far as it says.
    """

    parameters: dict[str, nn.Parameter]
    layout: Layout
    anchor_of: Callable[[str], Tensor]
    measure: Callable[[], dict[str, Drift]]
    description: str
    pulls: Mapping[str, Callable[[float], None]] = field(default_factory=dict)
    reference: nn.Module | None = None
    buffers: Buffers = field(default_factory=Buffers)
    base_ends: tuple[int, ...] = ()

    @property
    def fused(self) -> dict[str, Tensor]:
        """Everything that a fusion moves, by name: the parameters, and then the buffers."""
        return {**self.parameters, **self.buffers.fused}

    def base_of(self, name: str) -> Tensor:
        """Return what a parameter or buffer that is held whole is pulled toward, in its shape."""
        if name in self.buffers.fused:
            return self.anchor_of(name)
        return Shard.whole(self.layout.parameters[name].detach()).of(self.anchor_of(name))

    def peak_memory(self) -> int | None:
        """Return the most memory, in bytes, that the process has held so far: on the model's device."""
        device = next(iter(self.parameters.values())).device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        try:
            import resource
        except ImportError:  # not on Windows
            return None
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


def open_targets(
    model: nn.Module,
    anchor: AnchorSource | None,
    resize_vocabulary: bool = False,
    root: nn.Module | None = None,
) -> Targets:
    """Match a model with its anchor.

    Args:
        model: the SFT model; one with LoRA adapters (PEFT) carries its base with it.
        anchor: the base; None for a model with adapters, unless parameters were trained in place as well.
        resize_vocabulary: fuse the rows that the two vocabularies share by token index, and keep the
            model's rows for tokens that the anchor does not have.
        root: the module around the model that a strategy has wrapped, if it is not the model itself.

    Raises:
        ValueError: names, shapes or dtypes do not fit, the anchor is missing or shares the model's memory, parameters
            share one without being tied, or are of a kind that cannot be edited.
    """
    check_model(model)
    layout = open_layout(model, root)
    if is_adapted(model):
        if layout.sharded:
            raise ValueError(
                "Expected a model without adapters where parameters are sharded but got one with LoRA. Fuse the "
                "saved adapter instead (it is small): `lightning-rejuv`, or `rejuvenate` on one device."
            )
        return _adapted_targets(model, anchor, layout)
    if anchor is None:
        raise ValueError(
            "Expected an `anchor` but got None. Pass the base: its directory, a state dict or the module. Only "
            "a model with LoRA adapters carries its base with it."
        )
    source = Anchor.open(anchor).read_as(model)
    check_unquantised(model)
    check_apart(layout.parameters)
    resizable = _vocabulary(model, layout) if resize_vocabulary else frozenset()
    names = match(model, source, resizable, layout.shapes)
    check_anchor(model, anchor, source, names.values())
    buffers = find_buffers(model, source, beside(names))
    reference = anchor if isinstance(anchor, nn.Module) and _runs_like(anchor, model) else None
    there = {**names, **buffers.there}

    def anchor_of(name: str) -> Tensor:
        return source.tensor(there[name])

    return Targets(
        layout.parameters,
        layout,
        anchor_of,
        lambda: measure_drift(layout, anchor_of),
        source.description,
        reference=reference,
        buffers=buffers,
        base_ends=source.end_tokens,
    )


def _adapted_targets(model: nn.Module, anchor: AnchorSource | None, layout: Layout) -> Targets:
    source = None if anchor is None else Anchor.open(anchor).read_as(model)
    edited, base_under, measure, pulls = lora_targets(model, source)
    check_apart({n: p for n, p in layout.parameters.items() if n in edited or p.requires_grad})
    buffers = find_buffers(model, source, name_in_base)

    def anchor_of(name: str) -> Tensor:
        if name in buffers.fused:
            assert source is not None
            return source.tensor(buffers.there[name])
        return base_under(name)

    return Targets(edited, layout, anchor_of, measure, "the base under the adapters", pulls, buffers=buffers)


def _runs_like(anchor: nn.Module, model: nn.Module) -> bool:
    if type(anchor) is not type(model) or device_of(anchor) != device_of(model):
        return False
    shapes = ([p.shape for p in module.parameters()] for module in (anchor, model))
    return next(shapes) == next(shapes)  # they differ if the vocabulary was resized


def _vocabulary(model: nn.Module, layout: Layout) -> frozenset[str]:
    """Names of the parameters whose rows are tokens."""
    tables = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    ours = {id(p) for table in tables if table is not None for p in table.parameters()}
    return frozenset(name for name, p in layout.parameters.items() if id(p) in ours)
