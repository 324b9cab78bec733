"""What one neuron is: a row or a column of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["q", "k", "v", "o", "gate", "up", "down"]
WRITERS: tuple[Kind, ...] = ("o", "down")


@dataclass(frozen=True)
class NeuronGroup:
    """The neurons of one projection of one decoder layer.

    A neuron is an output row of the query, key, value, gate and up projections (they *read* the
    residual stream), and an input column of the attention output and down projections (they *write*
    into it).

    Attributes:
        parameter: name of the weight, as ``model.named_parameters()`` gives it.
        module: name of the module that owns it; its output is a reader's activation, its input a
            writer's.
        kind: which projection it is.
        layer: index of the decoder layer.
        dim: the weight's dimension along which its neurons are counted.
        count: how many neurons it has.
        bias: name of the bias that has one entry per neuron, if there is one.
    """

    parameter: str
    module: str
    kind: Kind
    layer: int
    dim: int
    count: int
    bias: str | None = None

    @property
    def writes(self) -> bool:
        """Whether its neurons write into the residual stream."""
        return self.kind in WRITERS
