"""The base as the monitor keeps it: it is opened on first use and never copied along with the monitor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import language_model
from lightning_rejuv.adapters import is_adapted
from lightning_rejuv.anchor import Anchor, AnchorSource, match
from lightning_rejuv.metrics._adapters import (
    NotMergeable,
    plain_view,
    under_adapters,
    why_base_is_unknown,
    with_adapters,
    without_adapters,
)
from lightning_rejuv.metrics._probe import Substituted
from lightning_rejuv.ops.drift_sums import drift_sums
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.open_layout import open_layout

#: For each parameter: Σ(w - b)², Σb², how many elements have not moved, and how many there are.
DriftSums = dict[str, tuple[Tensor, Tensor, Tensor, int]]


def is_init(source: Any) -> bool:
    """Tell whether an anchor is "init", which stands for the weights at the start of a fit."""
    return isinstance(source, str) and source == "init"


class Base:
    """An anchor that is opened lazily and shared between copies of the monitor.

    It is a plain object and no module: nothing of the base is registered as a parameter, saved in a checkpoint or
    moved to another device along with the monitor.
    """

    def __init__(self, source: AnchorSource) -> None:
        self._source = source
        self._anchor: Anchor | None = None

    @property
    def from_init(self) -> bool:
        """Whether the anchor is the weights at the start of a fit."""
        return is_init(self._source)

    def keep(self, outermost: nn.Module, *, resumed: bool) -> None:
        """Take a copy of the weights at the start of a fit, in the process's memory.

        Args:
            outermost: as for :meth:`drift`. If parameters are sharded this is a collective, and every process
                holds a copy of the whole.
            resumed: whether the fit resumes a run, whose copy is then kept.

        Raises:
            ValueError: the run is resumed in another process, which has no copy; or the model has adapters.
        """
        model = language_model(outermost)
        if is_adapted(model):
            raise ValueError(
                'Expected no adapters with `anchor="init"` but the model has some: its base lies under them. Pass '
                "`anchor=None`."
            )
        if resumed and self._anchor is None:
            raise ValueError(
                'Expected the start of a run for `anchor="init"` but the fit resumes one, whose first weights are '
                "gone. Pass their path, a state dict or the base as `anchor`."
            )
        if not resumed:
            wholes = open_layout(model, outermost).wholes()
            self._anchor = Anchor.open({name: whole.detach().to("cpu", copy=True) for name, whole in wholes})

    def open(self) -> Anchor:
        """Return the anchor, opened at the first call.

        Raises:
            ValueError: the anchor is the weights at the start of a fit, and there was no fit.
        """
        if self._anchor is None and self.from_init:
            raise ValueError(
                'Expected a fit with a PlasticityCallback for `anchor="init"`: it keeps the weights that the fit '
                "starts with. Outside of one pass the weights themselves: a path, or a deep copy's state dict."
            )
        if self._anchor is None:
            self._anchor = Anchor.open(self._source)
        return self._anchor

    def drift(self, outermost: nn.Module) -> DriftSums:
        """Measure every parameter: Σ(w - b)², Σb², how many elements have not moved, and how many there are.

        If parameters are sharded each process measures its own part and the sums are added up. Adapters are
        merged first, in a copy of one layer at a time.

        Args:
            outermost: the model, or what is around it; under FSDP the module that the strategy has wrapped.

        Raises:
            ValueError: names or shapes differ, or the anchor is the very model that is measured.
            NotMergeable: an adapter cannot be merged.
        """
        layout, base_of = self._match(outermost)
        model = language_model(outermost)
        if is_adapted(model):
            names = {id(parameter): name for name, parameter in layout.parameters.items()}
            return merged_drift(model, lambda parameter: base_of(names[id(parameter)], parameter))
        sums: dict[str, Tensor] = {}
        for name, shard in layout.walk(write=False):
            base = shard.of(base_of(name, shard.values))
            sums[name] = drift_sums(shard.values, base) / shard.copies
        device = next(iter(sums.values())).device
        totals = layout.total(torch.stack([parts.to(device) for parts in sums.values()]))
        return {
            name: (squares, base_squares, unmoved.round().long(), layout.shapes[name].numel())
            for name, (squares, base_squares, unmoved) in zip(sums, totals, strict=True)
        }

    @contextmanager
    def in_place_of(self, outermost: nn.Module) -> Iterator[nn.Module]:
        """Yield a module that runs as the base, from one copy of the base's weights on the model's devices.

        Args:
            outermost: as for :meth:`drift`.

        Raises:
            ValueError: as for :meth:`drift`, and if the model's parameters are sharded.
        """
        model = language_model(outermost)
        layout, base_of = self._match(outermost)
        if layout.sharded:
            raise ValueError(
                "Expected whole parameters to run the base in the model's place but they are sharded. Give the "
                "monitor no `probe` and no `base_samples` here, or measure the checkpoint on one device."
            )
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        weights = {
            own[id(layout.parameters[name])]: base_of(name, shard.values).to(shard.values)
            for name, shard in layout.walk(write=False)
        }
        with without_adapters(model):
            yield Substituted(model, weights)

    def _match(self, outermost: nn.Module) -> tuple[Layout, Callable[[str, Tensor], Tensor]]:
        """Return the model's layout, and what gives the base's whole tensor for a name and the model's own tensor."""
        model = language_model(outermost)
        layout, anchor = open_layout(model, outermost), self.open().read_as(model)
        if is_adapted(model):
            model, layout = _without_adapters_names(model, layout)
        names = match(model, anchor, shapes=layout.shapes)

        def base_of(name: str, own: Tensor) -> Tensor:
            base = anchor.tensor(names[name])
            if own.numel() and base.data_ptr() == own.data_ptr():
                raise ValueError(
                    f"Expected the anchor to hold the base's weights but its tensor for {name!r} is the model's own "
                    "memory, so that no drift could ever be seen. Pass a path, or a deep copy made before training."
                )
            return base

        return layout, base_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_anchor": None}


class BaseUnderAdapters:
    """The base that lies under a model's adapters, of which no copy is needed."""

    def drift(self, outermost: nn.Module) -> DriftSums:
        """Measure every parameter as :meth:`Base.drift` does.

        Raises:
            NotMergeable: an adapter cannot be merged, or parameters are sharded or not plain.
        """
        model = language_model(outermost)
        try:
            sharded = open_layout(model, outermost).sharded
        except ValueError as error:
            raise NotMergeable(str(error)) from error
        if sharded:
            raise NotMergeable("adapters cannot be merged if parameters are sharded")
        return merged_drift(model, lambda parameter: parameter)

    @contextmanager
    def in_place_of(self, outermost: nn.Module) -> Iterator[nn.Module]:
        """Yield a module that runs as the base, as :meth:`Base.in_place_of` does; parameters may be sharded."""
        model = language_model(outermost)
        with without_adapters(model):
            yield model


def base_under_adapters(model: nn.Module, warn: Callable[[str], None]) -> BaseUnderAdapters | None:
    """Return the base under a model's adapters; None without adapters or, with a warning, if it is not known."""
    if not is_adapted(model):
        return None
    unknown = why_base_is_unknown(model)
    if unknown is None:
        return BaseUnderAdapters()
    warn(
        f"The base under the adapters is not known: {unknown}. Entropy gap, support retention and drift are left out; "
        "pass the base as `anchor` for them."
    )
    return None


def merged_drift(model: nn.Module, base_of: Callable[[Tensor], Tensor]) -> DriftSums:
    """Measure the drift of a model with adapters.

    A tied parameter is measured once, and once more for each further use of it that has adapters.

    Args:
        model: the model.
        base_of: gives the base's value of a parameter that lies under the adapters.

    Raises:
        NotMergeable: an adapter cannot be merged.
    """
    sums: DriftSums = {}
    seen: set[int] = set()
    device = next(model.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for (name, under), (_, merged) in zip(under_adapters(model), with_adapters(model), strict=True):
            if merged is under and id(under) in seen:
                continue
            seen.add(id(under))
            squares, base_squares, unmoved = drift_sums(merged, base_of(under)).to(device)
            sums[name] = (squares, base_squares, unmoved.long(), under.numel())
    return sums


def _without_adapters_names(model: nn.Module, layout: Layout) -> tuple[nn.Module, Layout]:
    """Return the base's own parameters, under the names that they have without adapters, and their layout."""
    if layout.sharded:
        raise ValueError(
            "Expected a model without adapters, since its parameters are sharded, but got one with LoRA or "
            "another kind. Pass `anchor=None`, or measure the checkpoint on one device."
        )
    view = plain_view(model)
    return view, Layout(dict(view.named_parameters()))
