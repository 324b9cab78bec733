"""Parameters under DeepSpeed ZeRO 1 to 3: a float32 master, and the copy that the forward pass reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_rejuv.names import canonical_name
from lightning_rejuv.weights.layout import MOMENTUM, Layout
from lightning_rejuv.weights.shard import Shard


class DeepSpeedLayout(Layout):
    """Each parameter is gathered, edited alike on every process, and written to its master *and* its copy.

    An edit of the copy alone is undone by the next step of the engine; one of the master alone is not seen
    by the next forward pass.

    Args:
        parameters: by name.
    """

    sharded = True
    drops_state = False

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__({canonical_name(name): parameter for name, parameter in parameters.items()})
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}

    @override
    def walk(self, names: Iterable[str] | None = None, *, write: bool) -> Iterator[tuple[str, Shard]]:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        wanted = self.parameters if names is None else set(names)
        for name, parameter in self.parameters.items():
            if name not in wanted:
                continue
            # Frozen parameters have no master; under ZeRO 3 they are gathered like the others.
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            enabled = hasattr(parameter, "ds_id")
            with GatheredParameters([parameter], modifier_rank=0 if write else None, enabled=enabled):
                copy = parameter.detach()
                values = copy if master is None else master.to(copy.device).view_as(copy)
                yield name, Shard.whole(values)
                if write and master is not None:
                    copy.copy_(values)
            if write and master is not None:
                safe_set_full_fp32_param(parameter, values)

    @override
    def momenta(self, optimizer: Optimizer, name: str, keys: tuple[str, ...] = MOMENTUM) -> Iterator[Shard]:
        from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

        parameter = self.parameters[name]
        kept = {key for state in optimizer.state.values() for key in state}
        for key in sorted(kept.intersection(keys if parameter.requires_grad else ())):
            whole = safe_get_full_optimizer_state(parameter, key).view(self.shapes[name])
            yield Shard.whole(whole)
            safe_set_full_optimizer_state(parameter, whole, key)
