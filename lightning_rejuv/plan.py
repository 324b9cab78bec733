"""What a rejuvenation changes: a list of edits, and nothing of how it was decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_rejuv.neurons import NeuronGroup


@dataclass(frozen=True)
class GroupReset:
    """Neurons of one group that are returned to the base.

    Attributes:
        group: which weight, and which dimension of it counts neurons.
        index: 1-D int64, the rows or columns of ``group.matrix(weight)``, sorted.
    """

    group: NeuronGroup
    index: Tensor


@dataclass(frozen=True)
class Plan:
    """The edit of one model toward one anchor.

    Attributes:
        alpha: weight of the SFT model in the fusion: one, or one for each name pattern.
        alphas: weight of the SFT model for every parameter and buffer that fusion edits.
        resets: the neurons to reset, for every group of the neuron map; empty for fusion alone.
        moves: what a refit adds to parameters after that, in float32 or better, by name; empty without a refit.
    """

    alpha: float | Mapping[str, float]
    alphas: Mapping[str, float]
    resets: list[GroupReset] = field(default_factory=list)
    moves: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fuses(self) -> bool:
        """Whether anything is pulled toward the anchor as a whole."""
        return any(share < 1 for share in self.alphas.values())

    def parts(self) -> dict[str, list[tuple[NeuronGroup, int, Tensor]]]:
        """Return the rows and columns that are reset: group, dimension and index, by the parameter's name."""
        parts: dict[str, list[tuple[NeuronGroup, int, Tensor]]] = {}
        for reset in self.resets:
            for name, dim in ((reset.group.parameter, reset.group.dim), (reset.group.bias, 0)):
                if name is not None and len(reset.index):
                    parts.setdefault(name, []).append((reset.group, dim, reset.index))
        return parts

    def whole(self, parameters: Iterable[str]) -> list[str]:
        """Return those of some parameters of which every element is changed: fused or refitted."""
        return [name for name in parameters if self.alphas.get(name, 1.0) < 1 or name in self.moves]
