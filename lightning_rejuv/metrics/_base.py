"""The base's weights as the monitor keeps them: opened on first use, never copied with the monitor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import language_model
from lightning_rejuv.access.layout import Layout, layout_of
from lightning_rejuv.access.shard import Shard
from lightning_rejuv.anchor import Anchor, AnchorSource, match
from lightning_rejuv.ops.drift_sums import all_drift_sums


class Base:
    """An anchor that is opened lazily and shared between copies of the monitor.

    A plain object and no module: nothing of the base is registered as a parameter, saved in a checkpoint or
    moved to another device along with the monitor.
    """

    def __init__(self, source: AnchorSource) -> None:
        self._source = source
        self._anchor: Anchor | None = None

    def open(self) -> Anchor:
        """Return the anchor, opened at the first call."""
        if self._anchor is None:
            self._anchor = Anchor.open(self._source)
        return self._anchor

    def drift(self, outermost: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor, int]]:
        """Measure every parameter: Σ(w - b)², Σb², how many elements have not moved, and how many there are.

        Where parameters are sharded each process measures its own part and the sums are added up.

        Args:
            outermost: the model, or what is around it; under FSDP the module that the strategy has wrapped.

        Raises:
            ValueError: names or shapes differ, or the anchor is the very model that is measured.
        """
        layout, pairs = self._beside(outermost)
        sums: dict[str, Tensor] = {}
        for name, shard, base in pairs:
            parts = torch.stack([part.double() for part in all_drift_sums(shard.values, base, 0.0)])
            sums[name] = parts / shard.copies
        device = next(iter(sums.values())).device
        totals = layout.total(torch.stack([parts.to(device) for parts in sums.values()]))
        return {
            name: (squares, base_squares, unmoved.round().long(), layout.shapes[name].numel())
            for name, (squares, base_squares, unmoved) in zip(sums, totals, strict=True)
        }

    def weights_for(self, outermost: nn.Module) -> dict[str, Tensor]:
        """Return the base's weights under the model's names, on its devices and in its dtypes: one copy.

        Args:
            outermost: as for :meth:`drift`.

        Raises:
            ValueError: as :meth:`drift`, and where the model's parameters are sharded.
        """
        layout, pairs = self._beside(outermost)
        if layout.sharded:
            raise ValueError(
                "Expected whole parameters to run the base in the model's place but they are sharded. Give the "
                "monitor no `probe` and no `base_samples` here, or measure the checkpoint on one device."
            )
        return {name: base.to(shard.values) for name, shard, base in pairs}

    def _beside(self, outermost: nn.Module) -> tuple[Layout, Iterator[tuple[str, Shard, Tensor]]]:
        """Match the model: its layout; every parameter's name, this process's part of it and the base's."""
        model = language_model(outermost)
        layout, anchor = layout_of(model, outermost), self.open().read_as(model)
        names = match(model, anchor, shapes=layout.shapes)

        def pairs() -> Iterator[tuple[str, Shard, Tensor]]:
            for name, shard in layout.walk(write=False):
                base = anchor.tensor(names[name])
                if shard.values.numel() and base.data_ptr() == shard.values.data_ptr():
                    raise ValueError(
                        "Expected the anchor to hold the base's weights but its tensor for "
                        f"{name!r} is the model's own memory, so that no drift could ever be seen. "
                        "Pass a path, or a deep copy made before training."
                    )
                yield name, shard, shard.of(base)

        return layout, pairs()

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_anchor": None}
