"""What a fusion edits, and what each part of it is pulled toward: the interface, and a model without adapters."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_rejuv.anchor import Anchor
from lightning_rejuv.weights.buffers import Buffers
from lightning_rejuv.weights.drift import Drift, measure_drift
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.shard import Shard

Self = TypeVar("Self", bound="PlainTargets")


@dataclass(frozen=True)
class Targets(ABC):
    """The parameters and buffers that a fusion edits, matched with their values in the base.

    Attributes:
        parameters: by name; a tied one once.
        layout: how they are stored; it may hold others beside them.
        buffers: the floating buffers that are fused like parameters, and those that are not.
        description: where the base's values come from.
        reference: the anchor as a module that can be run in the model's place, if it is one.
        base_ends: the tokens with which the anchor's model ends a response, as far as it says.
    """

    parameters: Mapping[str, nn.Parameter]
    layout: Layout
    buffers: Buffers
    description: str
    reference: nn.Module | None = None
    base_ends: tuple[int, ...] = ()

    @abstractmethod
    def anchor_of(self, name: str) -> Tensor:
        """Return what a parameter or buffer is pulled toward, whole.

        It may have another number of rows if a vocabulary was resized.
        """

    @abstractmethod
    def measure(self) -> dict[str, Drift]:
        """Measure how far the model is from its anchor now; a collective if parameters are sharded."""

    @property
    def dora(self) -> bool:
        """Whether some parameters are fused by :meth:`pull` instead of a lerp of their own."""
        return False

    def pull(self, name: str, share: float) -> bool:
        """Fuse a parameter whose fusion is no lerp of its own (DoRA), and tell whether it is one.

        Args:
            name: the parameter.
            share: weight of the SFT model.
        """
        return False

    @property
    def fused(self) -> dict[str, Tensor]:
        """Everything that a fusion moves, by name: the parameters, and then the buffers."""
        return {**self.parameters, **self.buffers.fused}

    def base_of(self, name: str) -> Tensor:
        """Return what a parameter or buffer that is held whole is pulled toward, in its shape."""
        if name in self.buffers.fused:
            return self.anchor_of(name)
        return Shard.whole(self.layout.parameters[name].detach()).of(self.anchor_of(name))

    def peak_memory(self) -> int | None:
        """Return the most memory, in bytes, that the process has held so far: on the model's device."""
        device = next(iter(self.parameters.values())).device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        try:
            import resource
        except ImportError:  # not on Windows
            return None
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


@dataclass(frozen=True, kw_only=True)
class PlainTargets(Targets):
    """The targets of a model without adapters, which is pulled toward an anchor of its own shape.

    Attributes:
        anchor: the base.
        names: from a parameter's name to the anchor's.
    """

    anchor: Anchor
    names: Mapping[str, str]

    def anchor_of(self, name: str) -> Tensor:
        """Return the anchor's tensor for a parameter or buffer."""
        return self.anchor.tensor(self.names[name] if name in self.names else self.buffers.anchor_names[name])

    def measure(self) -> dict[str, Drift]:
        """Measure every parameter, streaming the anchor tensor by tensor."""
        return measure_drift(self.layout, self.anchor_of)

    def of_copy(self: Self, copied: nn.Module) -> Self:
        """Return the targets of a copy of the model on one device, pulled toward the same anchor.

        Args:
            copied: has parameters and buffers of the same names.
        """
        fused = {name: copied.get_buffer(name) for name in self.buffers.fused}
        layout = Layout(dict(copied.named_parameters()))
        return replace(
            self,
            parameters=layout.parameters,
            layout=layout,
            buffers=replace(self.buffers, fused=fused),
            reference=None,  # the anchor as a module may lie on another device
        )
