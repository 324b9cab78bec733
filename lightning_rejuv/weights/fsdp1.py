"""Parameters under FSDP1 (``FullyShardedDataParallel``): flat shards that are put together unit by unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import Optimizer
from typing_extensions import override

from lightning_rejuv._compat import fsdp1_interval
from lightning_rejuv.names import canonical_name, listing
from lightning_rejuv.weights.layout import MOMENTUM, Layout
from lightning_rejuv.weights.shard import Shard


class FSDP1Layout(Layout):
    """Each wrapped unit is gathered, edited alike on every process, and written back.

    Extra memory is that of the largest unit, not of the largest tensor.

    Args:
        model: the model; some of its modules, or ``root``, are wrapped.
        root: the outermost FSDP module.

    Raises:
        ValueError: a parameter outside every unit, or units without ``use_orig_params=True``.
    """

    sharded = True

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        super().__init__({canonical_name(name): parameter for name, parameter in model.named_parameters()})
        flat = [name for name, parameter in self.parameters.items() if isinstance(parameter, FlatParameter)]
        if flat:
            raise ValueError(
                f"Expected FSDP units with `use_orig_params=True` but {listing(flat)} have their parameters "
                "concatenated: which element is whose cannot be told."
            )
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._units = [
            (unit, {names[id(p)]: p for p in _own_parameters(unit) if id(p) in names})
            for unit in FSDP.fsdp_modules(root)
        ]
        missing = set(self.parameters).difference(*(own for _, own in self._units))
        if missing:
            raise ValueError(
                f"Expected every parameter to belong to an FSDP unit but {listing(missing)} do not: wrap what "
                "holds them."
            )
        with FSDP.summon_full_params(self._units[0][0], recurse=False, writeback=False):
            pass  # the outermost unit has to be the first that is gathered: FSDP takes that one for the root
        self.shapes = {name: shard.shape for name, shard in self.walk(write=False)}

    @override
    def walk(self, names: Iterable[str] | None = None, *, write: bool) -> Iterator[tuple[str, Shard]]:
        wanted = self.parameters if names is None else set(names)
        for unit, own in self._units:
            chosen = {name: parameter for name, parameter in own.items() if name in wanted}
            if chosen:
                with FSDP.summon_full_params(unit, recurse=False, writeback=write):
                    for name, parameter in chosen.items():
                        yield name, Shard.whole(parameter.detach())

    @override
    def momenta(self, optimizer: Optimizer, name: str, keys: tuple[str, ...] = MOMENTUM) -> Iterator[Shard]:
        parameter, shape = self.parameters[name], self.shapes[name]
        unit = next(unit for unit, own in self._units if name in own)
        start, stop = fsdp1_interval(unit, parameter)
        for moment in self._moments(optimizer, name, keys):
            whole = moment.new_zeros(shape.numel())
            whole[start:stop] = moment
            yield Shard.whole(whole.view(shape))
            moment.copy_(whole[start:stop])


def _own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of a unit without those of the units inside it."""
    waiting = list(unit.children())
    yield from unit.parameters(recurse=False)
    while waiting:
        module = waiting.pop(0)
        if not isinstance(module, FSDP):
            yield from module.parameters(recurse=False)
            waiting[:0] = module.children()
