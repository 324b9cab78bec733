"""What a rejuvenation did, in numbers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_rejuv.alpha import AlphaSearch


@dataclass(frozen=True)
class TensorReport:
    """One parameter.

    Attributes:
        name: its name in the model.
        drift_before: relative L2 distance ‖w - b‖ / ‖b‖ from the anchor before the edit.
        drift_after: the same after it.
        neurons: how many neurons its rows or columns are; 0 where it has none.
        reset: how many of them were reset.
        layer: its decoder layer, None outside the layers.
        kind: which projection it is, None where it has no neurons.
    """

    name: str
    drift_before: float
    drift_after: float
    neurons: int = 0
    reset: int = 0
    layer: int | None = None
    kind: str | None = None


@dataclass(frozen=True)
class AttributionReport:
    """How the neurons were chosen.

    Attributes:
        rule: which positions were looked at.
        positions: how many.
        sharpened: how many of them are sharpened: the base already knew the token.
        learned: how many of them are learned: the token is new to the base.
        reconstruction_error: largest relative error of the logits that the contributions add up to.
        entropy_base: mean token entropy of the anchor on the calibration responses, nats.
        entropy_before: the same of the model before the edit.
        entropy_after: the same after it.
    """

    rule: str
    positions: int
    sharpened: int
    learned: int
    reconstruction_error: float
    entropy_base: float
    entropy_before: float
    entropy_after: float


@dataclass(frozen=True)
class RejuvenationReport:
    """What :func:`lightning_rejuv.rejuvenate` did. ``print(report)`` is a table.

    Attributes:
        anchor: where the anchor came from.
        alpha: weight of the SFT model in the fusion.
        omega: weight of the anchor on the reset neurons.
        reset_fraction: the share of the neurons that was asked for.
        rank_by: how neurons were ranked.
        drift_before: pooled relative L2 distance from the anchor, all parameters, before.
        drift_after: the same after.
        tensors: a report per parameter.
        attribution: how neurons were chosen; None for fusion alone.
        search: how alpha was found; None where it was given.
        seconds: wall time.
    """

    anchor: str
    alpha: float
    omega: float
    reset_fraction: float
    rank_by: str
    drift_before: float
    drift_after: float
    tensors: list[TensorReport]
    attribution: AttributionReport | None
    search: AlphaSearch | None
    seconds: float

    @property
    def neurons(self) -> int:
        """Number of neurons that the neuron map knows in the model."""
        return sum(tensor.neurons for tensor in self.tensors)

    @property
    def neurons_reset(self) -> int:
        """Number of neurons that were reset."""
        return sum(tensor.reset for tensor in self.tensors)

    def summary(self) -> str:
        """One line: what changed and how much."""
        text = (
            f"alpha {self.alpha:.3f}, drift from the anchor {self.drift_before:.3f} -> {self.drift_after:.3f}"
        )
        if self.neurons_reset:
            text += f", {self.neurons_reset} of {self.neurons} neurons reset"
        if self.attribution:
            a = self.attribution
            text += f", token entropy {a.entropy_before:.3f} -> {a.entropy_after:.3f} nats"
            text += f" (anchor {a.entropy_base:.3f})"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers."""
        return {**asdict(self), "neurons": self.neurons, "neurons_reset": self.neurons_reset}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON; the file appears whole or not at all."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        part.replace(target)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"Rejuvenation toward {self.anchor}"
        yield f"  alpha            {self.alpha:.3f}{self._how_alpha()}"
        drift = f"{self.drift_before:.4f} -> {self.drift_after:.4f}"
        yield f"  drift            {drift}  (‖w - b‖ / ‖b‖, all parameters)"
        if self.attribution:
            a = self.attribution
            share = f"{self.neurons_reset} of {self.neurons} ({self.neurons_reset / self.neurons:.2%})"
            yield f"  neurons reset    {share}, ranked {self.rank_by}"
            yield (
                f"  positions        {a.positions} ({a.rule}): {a.sharpened} sharpened, {a.learned} learned; "
                f"reconstruction error {a.reconstruction_error:.1e}"
            )
            yield (
                f"  token entropy    {a.entropy_before:.4f} -> {a.entropy_after:.4f} nats "
                f"(anchor {a.entropy_base:.4f}), teacher-forced"
            )
            yield from self._map()
        yield f"  seconds          {self.seconds:.2f}"

    def _how_alpha(self) -> str:
        if self.search is None:
            return ""
        return f"  (found: excess NLL <= {self.search.target:g} nats on each of the anchor's own responses)"

    def _map(self) -> Iterator[str]:
        """Reset neurons by layer and projection."""
        held = [t for t in self.tensors if t.kind]
        kinds = list(dict.fromkeys(str(t.kind) for t in held))
        layers = sorted({t.layer for t in held if t.layer is not None})
        counts: Counter[tuple[int | None, str | None]] = Counter()
        for tensor in held:
            counts[tensor.layer, tensor.kind] += tensor.reset
        busiest = sorted(layers, key=lambda layer: -sum(counts[layer, kind] for kind in kinds))[:8]
        yield "  by layer         " + "".join(f"{kind:>6}" for kind in kinds)
        for layer in sorted(busiest):
            yield f"    {layer:<15}" + "".join(f"{counts[layer, kind]:>6}" for kind in kinds)
        if len(layers) > len(busiest):
            yield f"    … the {len(layers) - len(busiest)} other layers hold fewer each"
