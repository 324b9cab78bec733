"""Parameters that are DTensors: FSDP2 (``fully_shard``), tensor parallel, and both together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_rejuv._compat import local_offset
from lightning_rejuv.names import canonical_name, listing
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.shard import Shard


class DTensorLayout(Layout):
    """Every process edits its own shard in place; only sums are exchanged.

    Args:
        parameters: by name: DTensors, and plain parameters that every process holds whole.

    Raises:
        ValueError: a DTensor with a pending sum (``Partial``).
    """

    sharded = True

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__({canonical_name(name): parameter for name, parameter in parameters.items()})
        self._device = next(iter(self.parameters.values())).device
        placements = {name: p.placements for name, p in self.parameters.items() if isinstance(p, DTensor)}
        unknown = {name: cut for name, cut in placements.items() if any(p.is_partial() for p in cut)}
        if unknown:
            raise ValueError(
                "Expected parameters that are sharded or replicated but got "
                f"{listing(f'{name} {cut}' for name, cut in unknown.items())}."
            )

    @override
    def wholes(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @override
    def _part(self, tensor: Tensor) -> Shard:
        return shard_of(tensor)

    @override
    def total(self, sums: Tensor) -> Tensor:
        everywhere = sums.to(self._device)
        dist.all_reduce(everywhere)
        return everywhere.to(sums.device)


def shard_of(tensor: Tensor) -> Shard:
    """Return this process's part of a DTensor, or of a plain tensor that every process holds whole."""
    processes = dist.get_world_size()
    values = tensor.detach()
    if not isinstance(values, DTensor):
        return Shard(values, values.shape, (0,) * values.dim(), copies=processes)
    mesh = values.device_mesh
    parts = prod(
        mesh.size(dim) for dim, placement in enumerate(values.placements) if not placement.is_replicate()
    )
    return Shard(values.to_local(), values.shape, local_offset(values), copies=processes // parts)
