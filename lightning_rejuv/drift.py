"""How far a model's parameters are from its anchor's, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rejuv.functional.relative_drift import _relative_drift_compute, _relative_drift_update
from lightning_rejuv.names import listing


@dataclass(frozen=True)
class Drift:
    """Squared L2 norms of one parameter's difference from its anchor, and of the anchor itself."""

    difference: float
    base: float

    @property
    def relative(self) -> float:
        """‖w - b‖ / ‖b‖; infinite where only the anchor is zero."""
        return float(_relative_drift_compute(torch.tensor(self.difference), torch.tensor(self.base)))


def measure_drift(parameters: Mapping[str, Tensor], base_of: Callable[[str], Tensor]) -> dict[str, Drift]:
    """Measure every parameter's drift, streaming the anchor tensor by tensor.

    Args:
        parameters: the parameters by name.
        base_of: gives the anchor's tensor for a parameter's name.

    >>> drift = measure_drift({"weight": torch.ones(3)}, lambda name: torch.full((3,), 0.5))
    >>> round(drift["weight"].relative, 3)
    1.0
    """
    sums = {name: _relative_drift_update(p, base_of(name)) for name, p in parameters.items()}
    return {name: Drift(float(difference), float(base)) for name, (difference, base) in sums.items()}


def pooled(drift: Mapping[str, Drift]) -> float:
    """Relative drift of all parameters taken as one vector."""
    return Drift(sum(d.difference for d in drift.values()), sum(d.base for d in drift.values())).relative


def check_finite(
    drift: Mapping[str, Drift],
    parameters: Mapping[str, Tensor],
    base_of: Callable[[str], Tensor],
    description: str,
) -> None:
    """Refuse a model or an anchor with NaN or infinity in it, and an anchor that is the model itself.

    Args:
        drift: what was measured; it is not finite where one of the two tensors is not.
        parameters: the parameters by name, to say which it was.
        base_of: gives the anchor's tensor for a parameter's name.
        description: where the anchor comes from.

    Raises:
        ValueError: with the names of the tensors.
    """
    if not all(math.isfinite(d.difference) and math.isfinite(d.base) for d in drift.values()):
        for whose, tensor_of in (("model", parameters.__getitem__), (f"anchor ({description})", base_of)):
            found = [name for name in parameters if not bool(torch.isfinite(tensor_of(name)).all())]
            if found:
                raise ValueError(
                    f"Expected finite weights but the {whose} holds NaN or infinity in {listing(found)}."
                )
    if not any(d.difference for d in drift.values()):
        raise ValueError(
            f"The anchor ({description}) equals the model in every parameter: there is nothing to pull back. "
            "Pass the base from before SFT."
        )
