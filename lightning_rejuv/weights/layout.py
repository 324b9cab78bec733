"""How the parameters of a model are stored: whole on every process, or in shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rejuv.weights.shard import Shard

# What optimizers call the running mean of the gradient.
MOMENTUM = ("exp_avg", "momentum_buffer")


class Layout:
    """Parameters that every process holds whole: one device, DDP. The base of the sharded layouts.

    A sharded layout has collectives in all its methods: every process calls them, in the same order.

    Args:
        parameters: by name.

    Attributes:
        parameters: by name; for a sharded layout without the parts that wrappers put into names.
        shapes: the whole parameters' shapes, by name.
        sharded: whether a process holds parts only.
        drops_state: whether a parameter's optimizer state can be dropped, to start afresh.
    """

    sharded = False
    drops_state = True

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}

    def walk(self, names: Iterable[str] | None = None, *, write: bool) -> Iterator[tuple[str, Shard]]:
        """Go through the parameters, in an order of the layout's own, one tensor in memory at a time.

        Args:
            names: which parameters; all by default.
            write: whether what is written into a part has to reach the parameter. It has reached it by the
                time the next one is asked for.
        """
        wanted = self.parameters if names is None else set(names)
        for name, parameter in self.parameters.items():
            if name in wanted:
                yield name, self._part(parameter.detach())

    def wholes(self) -> Iterator[tuple[str, Tensor]]:
        """Go through the parameters, each as a whole tensor, never to be written to."""
        for name, shard in self.walk(write=False):
            yield name, shard.values

    def momenta(self, optimizer: Optimizer, name: str, keys: tuple[str, ...] = MOMENTUM) -> Iterator[Shard]:
        """Go through the running means of a parameter's gradient that an optimizer keeps, to be written to.

        Args:
            optimizer: as PyTorch has it, without a strategy's wrapper.
            name: the parameter's.
            keys: what the optimizer calls them, or other states of the parameter's shape.
        """
        for moment in self._moments(optimizer, name, keys):
            yield self._part(moment)

    def _moments(self, optimizer: Optimizer, name: str, keys: tuple[str, ...]) -> Iterator[Tensor]:
        parameter = self.parameters[name]
        state = optimizer.state.get(parameter, {})
        found = (state.get(key) for key in keys)
        return (m for m in found if isinstance(m, Tensor) and m.shape == parameter.shape)

    def _part(self, tensor: Tensor) -> Shard:
        """Describe what this process holds of a parameter, or of a tensor that is stored as it is."""
        return Shard.whole(tensor)

    def total(self, sums: Tensor) -> Tensor:
        """Add up over all processes what each has summed over its parts.

        Args:
            sums: float64, each divided by its part's ``copies``.
        """
        return sums
