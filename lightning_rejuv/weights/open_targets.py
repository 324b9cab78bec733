"""Matching a model with its anchor: which parameters and buffers a fusion edits, and what each is pulled toward."""

from __future__ import annotations

from torch import nn

from lightning_rejuv.adapters import is_adapted
from lightning_rejuv.anchor import Anchor, AnchorSource, match
from lightning_rejuv.forward import device_of
from lightning_rejuv.weights.adapter_targets import adapter_targets
from lightning_rejuv.weights.buffers import beside, find_buffers
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.open_layout import open_layout
from lightning_rejuv.weights.refusals import check_anchor, check_apart, check_model, check_unquantised
from lightning_rejuv.weights.targets import PlainTargets, Targets


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
                "Expected a model without adapters, since its parameters are sharded, but got one with LoRA. Fuse the "
                "saved adapter instead (it is small): `lightning-rejuv`, or `rejuvenate` on one device."
            )
        source = None if anchor is None else Anchor.open(anchor).read_as(model)
        targets = adapter_targets(model, source, layout)
        edited = targets.parameters
        check_apart({n: p for n, p in layout.parameters.items() if n in edited or p.requires_grad})
        return targets
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
    return PlainTargets(
        layout.parameters,
        layout,
        find_buffers(model, source, beside(names)),
        source.description,
        reference=anchor if isinstance(anchor, nn.Module) and _runs_like(anchor, model) else None,
        base_ends=source.end_tokens,
        anchor=source,
        names=names,
    )


def _runs_like(anchor: nn.Module, model: nn.Module) -> bool:
    if type(anchor) is not type(model) or device_of(anchor) != device_of(model):
        return False
    shapes = ([p.shape for p in module.parameters()] for module in (anchor, model))
    return next(shapes) == next(shapes)  # they differ if the vocabulary was resized


def _vocabulary(model: nn.Module, layout: Layout) -> frozenset[str]:
    """Names of the parameters whose rows are tokens."""
    tables = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    rows_are_tokens = {id(p) for table in tables if table is not None for p in table.parameters()}
    return frozenset(name for name, p in layout.parameters.items() if id(p) in rows_are_tokens)
