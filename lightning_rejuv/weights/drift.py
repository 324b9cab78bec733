"""How far a model's parameters are from its anchor's, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rejuv.functional.weights import _relative_drift_compute
from lightning_rejuv.names import listing
from lightning_rejuv.ops.drift_sums import drift_sums
from lightning_rejuv.weights.layout import Layout


@dataclass(frozen=True)
class Drift:
    """Squared L2 norms of one parameter's difference from its anchor, and of the anchor itself."""

    difference: float
    base: float

    @property
    def relative(self) -> float:
        """‖w - b‖ / ‖b‖; infinite if only the anchor is zero."""
        sums = torch.tensor([self.difference, self.base], dtype=torch.float64)
        return float(_relative_drift_compute(sums[0], sums[1]))


def measure_drift(layout: Layout, anchor_of: Callable[[str], Tensor]) -> dict[str, Drift]:
    """Measure every parameter's drift, streaming the anchor tensor by tensor.

    Args:
        layout: the parameters; sharded ones are measured where they lie, and the sums added up.
        anchor_of: gives the anchor's tensor for a parameter's name.

    >>> layout = Layout({"weight": torch.nn.Parameter(torch.ones(3))})
    >>> drift = measure_drift(layout, lambda name: torch.full((3,), 0.5))
    >>> round(drift["weight"].relative, 3)
    1.0
    """
    sums: dict[str, Tensor] = {}  # on the devices of the parameters: nothing waits until all are measured
    for name, shard in layout.walk(write=False):
        parts = drift_sums(shard.values, shard.of(anchor_of(name)))
        sums[name] = parts if shard.copies == 1 else parts / shard.copies
    device = next(iter(sums.values())).device
    total = layout.total(torch.stack([parts.to(device) for parts in sums.values()]).cpu()).tolist()
    return {name: Drift(difference, base) for name, (difference, base, _) in zip(sums, total, strict=True)}


def pooled(drift: Mapping[str, Drift]) -> float:
    """Return the relative drift of all parameters taken as one vector."""
    return Drift(sum(d.difference for d in drift.values()), sum(d.base for d in drift.values())).relative


def check_finite(drift: Mapping[str, Drift], description: str, *, may_be_equal: bool = False) -> None:
    """Refuse a model or an anchor with NaN or infinity in it, and an anchor that is the model itself.

    Args:
        drift: what was measured; it is not finite if one of the two tensors is not.
        description: where the anchor comes from.
        may_be_equal: whether the model may equal its anchor, since it has not been trained yet.

    Raises:
        ValueError: with the names of the tensors.
    """
    anchors = [name for name, d in drift.items() if not math.isfinite(d.base)]
    models = [name for name, d in drift.items() if not math.isfinite(d.difference) and name not in anchors]
    for whose, found in ((f"anchor ({description})", anchors), ("model", models)):
        if found:
            raise ValueError(
                f"Expected finite weights but the {whose} holds NaN or infinity in {listing(found)}."
            )
    if not may_be_equal and not any(d.difference for d in drift.values()):
        raise ValueError(
            f"The anchor ({description}) equals the model in every parameter: there is nothing to pull back. "
            "Pass the base from before SFT, or activate the adapter that was trained."
        )
