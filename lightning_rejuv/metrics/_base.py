"""The base's weights as the monitor keeps them: opened on first use, never copied with the monitor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_rejuv.anchor import Anchor, AnchorSource, match


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

    def pairs(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield every parameter's name, the parameter and the base's tensor, one at a time, tied ones once.

        Raises:
            ValueError: names or shapes differ, or the anchor is the very model that is measured.
        """
        anchor = self.open()
        names = match(model, anchor)
        for name, parameter in model.named_parameters():
            base = anchor.tensor(names[name])
            if parameter.numel() and base.data_ptr() == parameter.data_ptr():
                raise ValueError(
                    "Expected the anchor to hold the base's weights but its tensor for "
                    f"{name!r} is the model's own memory, so that no drift could ever be seen. "
                    "Pass a path, or a deep copy made before training."
                )
            yield name, parameter.detach(), base

    def weights_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the base's weights under the model's names, on its devices and in its dtypes: one copy."""
        return {name: base.to(parameter) for name, parameter, base in self.pairs(model)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_anchor": None}
