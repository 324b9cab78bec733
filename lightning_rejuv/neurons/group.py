"""What one neuron is: a row or a column of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["q", "k", "v", "o", "gate", "up", "down", "out"]
WRITERS: tuple[Kind, ...] = ("o", "down")


@dataclass(frozen=True)
class NeuronGroup:
    """The neurons of one projection: of one decoder layer, or of one expert of it.

    A neuron is an output row of the query, key, value, gate and up projections (they *read* the
    residual stream), and an input column of the attention output and down projections (they *write*
    into it). A layer that stores its weight transposed has rows and columns exchanged.

    Attributes:
        parameter: name of the weight, as ``model.named_parameters()`` gives it.
        module: name of the module that owns it; its output is a reader's activation, its input a
            writer's.
        kind: which projection it is; "out" for the rows of a layer that is in no decoder.
        layer: index of the decoder layer; of the group itself in a module that is no decoder.
        dim: the dimension of the weight, or of the expert's slice of it, that counts the neurons.
        count: how many neurons it has.
        index: 1-D int64, where its neurons lie along ``dim`` in a weight that fuses several
            projections; None if the weight holds this one alone.
        bias: name of the bias that has one entry per neuron, if there is one.
        expert: which expert's slice of a 3-D weight it is, None for an ordinary weight.
        fixed: whether its weight is the base's own, without an adapter, so that there is nothing to reset.
    """

    parameter: str
    module: str
    kind: Kind
    layer: int
    dim: int
    count: int
    index: Tensor | None = None
    bias: str | None = None
    expert: int | None = None
    fixed: bool = False

    @property
    def writes(self) -> bool:
        """Whether its neurons write into the residual stream."""
        return self.kind in WRITERS

    def matrix(self, parameter: Tensor) -> Tensor:
        """Return the 2-D weight (or 1-D bias) that holds the neurons: a view of the parameter."""
        return parameter if self.expert is None else parameter[self.expert]

    def place(self, neurons: Tensor) -> Tensor:
        """Turn neuron numbers, 0 to ``count - 1``, into indices along ``dim`` of :meth:`matrix`."""
        return neurons if self.index is None else self.index[neurons.to(self.index.device)]

    def own(self, activation: Tensor) -> Tensor:
        """Pick this group's neurons from the last dimension of its module's activation."""
        return activation if self.index is None else activation[..., self.index.to(activation.device)]
