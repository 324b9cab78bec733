"""Optimizers that hold weights themselves: copies, averages or a start of the weights that they step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_rejuv.names import listing
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.shard import Shard

#: What is left over from rounding the weights before the edit (Kahan summation).
KAHAN = ("kahan_comp", "compensation", "shift")
#: States that are weights even where they lie far from the parameter's, in a model trained from scratch.
_COPIES = (
    *("master_param", "master_params", "fp32_param", "p0", "x0"),
    *("slow_buffer", "slow_params", "cached_params", "lookahead_params", "lookahead_slow_buff"),
)
#: Counts and running means of gradients: no weights, also where a gradient is near its parameter by chance, or by
#: a decay of the weights that is part of it.
_MOMENTS = (
    *("step", "eta", "mu", "mu_product", "sum", "prev", "step_size", "H_diag", "prev_loss", "d", "t"),
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_avg_var", "exp_avg_slow", "exp_inf"),
    *("momentum_buffer", "square_avg", "grad_avg", "acc_delta", "hessian", "neg_pre_grad", "variance"),
)
# A state of another name that is no farther from the parameters than half their length is a copy of them. What is
# compared is how elements differ from their mean: gains near 1 and a running mean of squares that has grown to 1 are
# no more alike than other numbers, and a single number says nothing.
_NEAR = 0.5
_PIECE = 1 << 24
# Optimizers that wrap another one call it so.
_WRAPPED = ("optimizer", "base_optimizer", "base", "_optimizer")


def unwrapped(optimizers: Iterable[Any]) -> Iterator[Optimizer]:
    """Go through optimizers and those that they wrap (Lightning, DeepSpeed, Lookahead), each state once."""
    seen: list[Any] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        inner = (vars(optimizer).get(name) for name in _WRAPPED)
        waiting += [o for o in inner if hasattr(o, "param_groups")]
        state = getattr(optimizer, "state", None)
        if isinstance(state, Mapping) and not any(state is other for other in seen):
            seen.append(state)
            yield optimizer


def states_of(optimizer: Optimizer) -> dict[Tensor, Mapping[str, Any]]:
    """Return what an optimizer keeps for each parameter; some keep counts of their own beside it."""
    found = optimizer.state.items()
    return {p: state for p, state in found if isinstance(p, Tensor) and isinstance(state, Mapping)}


@dataclass(frozen=True)
class WeightCopies:
    """The states of optimizers that are weights: an edit of a parameter has to be made of them as well.

    Float32 masters, the slow weights of Lookahead, the average of ASGD, the start ``p0`` of Prodigy and ``x0``
    of dual averaging, the sequence ``z`` of schedule-free optimizers: all of these are points beside the
    parameter, and affine combinations of such points stay what they are if each goes through the same
    lerp. If weights are ``x0`` minus a sum ``s``, the sum is scaled as the distances are.

    Attributes:
        layout: the parameters.
        keys: for each optimizer the names of these states.

    >>> net = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.ASGD(net.parameters())
    >>> net(torch.ones(2)).sum().backward()
    >>> _ = optimizer.step()
    >>> [keys for _, keys in WeightCopies.find([optimizer], Layout(dict(net.named_parameters()))).keys]
    [('ax',)]
    """

    layout: Layout
    keys: list[tuple[Optimizer, tuple[str, ...]]]

    @classmethod
    @torch.no_grad()
    def find(cls, optimizers: Iterable[Optimizer], layout: Layout) -> WeightCopies:
        """Look for them, before the edit: by their names and by their values.

        This is a collective if parameters are sharded.

        Raises:
            ValueError: one does not have its parameter's shape and cannot be edited.
        """
        found = []
        for optimizer in unwrapped(optimizers):
            keys = tuple(sorted(_near(optimizer, layout.sharded)))
            if keys:
                found.append((optimizer, keys))
        copies = cls(layout, found)
        copies._check()
        return copies

    def __bool__(self) -> bool:
        return bool(self.keys)

    def walk(self, names: Iterable[str]) -> Iterator[tuple[str, Shard, bool]]:
        """Go through the copies of some parameters, to be written to.

        Yields:
            Name of the parameter, the copy, and whether it is a displacement: then it is pulled toward zero if
            weights are pulled toward the anchor.
        """
        wanted = set(names)
        for optimizer, keys in self.keys:
            for name, parameter in self.layout.parameters.items():
                if name not in wanted:
                    continue
                state = optimizer.state.get(parameter, {})
                for key in keys:
                    if not self.layout.sharded and _is_sample(state.get(key), parameter):
                        stride = _stride(optimizer, parameter)
                        whole = _spread(state[key], parameter, stride)
                        yield name, Shard.whole(whole), False
                        state[key] = whole.view(-1)[::stride].clone()
                    else:
                        for copy in self.layout.momenta(optimizer, name, (key,)):
                            yield name, copy, False
                if "x0" in keys and "s" in state:
                    for sum_ in self.layout.momenta(optimizer, name, ("s",)):
                        yield name, sum_, True

    def _check(self) -> None:
        wrong = []
        for optimizer, keys in self.keys:
            for name, parameter in self.layout.parameters.items():
                state = optimizer.state.get(parameter, {})
                for key in keys:
                    held = state.get(key)
                    if not isinstance(held, Tensor) or held.shape == parameter.shape:
                        continue
                    if self.layout.sharded or not _fits(held, parameter, _stride(optimizer, parameter)):
                        wrong.append(f"{name} ({key!r} of {type(optimizer).__name__})")
        if wrong:
            raise ValueError(
                "Expected copies of the weights in the optimizer's state to have their parameters' shapes but these do "
                f"not: {listing(wrong)}. They would undo the rejuvenation: make it before this fit."
            )


def _near(optimizer: Optimizer, sharded: bool) -> set[str]:
    """Names of the states that are copies of the parameters which an optimizer steps."""
    sums: dict[str, list[float]] = {}
    for parameter, state in states_of(optimizer).items():
        stride = _stride(optimizer, parameter)
        for key, held in state.items():
            if not isinstance(held, Tensor) or not held.is_floating_point() or key in _MOMENTS:
                continue
            if key in _COPIES:
                sums[key] = [0.0, 0.0]
                continue
            weight, other = _local(parameter), _local(held)
            if other.shape != weight.shape:
                weight = weight.flatten()[::stride]
            if other.shape == weight.shape and other.numel():
                distance, norm = sums.setdefault(key, [0.0, 0.0])
                more, length = _distance(other, weight)
                sums[key] = [distance + more, norm + length]
    if sharded and dist.is_available() and dist.is_initialized():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, sums)
        sums = {}
        for of_rank in everywhere:
            for key, (distance, norm) in of_rank.items():
                old = sums.get(key, [0.0, 0.0])
                sums[key] = [old[0] + distance, old[1] + norm]
    averages = any("weight_sum" in group for group in optimizer.param_groups)  # schedule-free
    return {
        key
        for key, (distance, norm) in sums.items()
        if key in _COPIES or (key == "z" and averages) or (norm and distance <= _NEAR**2 * norm)
    }


def _distance(held: Tensor, parameter: Tensor) -> tuple[float, float]:
    """Return the squared distance of two tensors, and the squared length of the second, both without their means."""
    sums = [0.0] * 4
    pieces = (tensor.reshape(-1).split(_PIECE) for tensor in (held, parameter))  # to save memory
    starts: tuple[Tensor, Tensor] | None = None
    for copied, weight in zip(*pieces, strict=True):
        wide = weight.float()
        apart = copied.to(weight.device).float() - wide
        if starts is None:
            starts = apart[0].clone(), wide[0].clone()  # near the means, so that little is lost below
        apart, wide = apart - starts[0], wide - starts[1]
        found = (apart.square(), apart, wide.square(), wide)
        sums = [old + float(part.sum(dtype=torch.float64)) for old, part in zip(sums, found, strict=True)]
    count = parameter.numel()
    return max(sums[0] - sums[1] ** 2 / count, 0.0), max(sums[2] - sums[3] ** 2 / count, 0.0)  # or NaN


def _local(tensor: Tensor) -> Tensor:
    whole = tensor.detach()
    return whole.to_local() if hasattr(whole, "to_local") else whole


def _stride(optimizer: Optimizer, parameter: Tensor) -> int:
    """Prodigy may keep every n-th element of its start alone."""
    for group in optimizer.param_groups:
        if "slice_p" in group and any(p is parameter for p in group["params"]):
            return int(group["slice_p"])
    return 1


def _is_sample(held: Any, parameter: Tensor) -> bool:
    return isinstance(held, Tensor) and held.shape != parameter.shape


def _fits(held: Tensor, parameter: Tensor, stride: int) -> bool:
    return held.numel() == 1 or held.numel() == -(-parameter.numel() // stride)


def _spread(held: Tensor, parameter: Tensor, stride: int) -> Tensor:
    """Put a flat or scalar copy into the parameter's shape; what it does not hold is not read again."""
    whole = parameter.detach().to(held.dtype, copy=True, memory_format=torch.contiguous_format)
    if held.numel() == 1:  # Prodigy's start of a parameter that was zero
        return whole.fill_(held.item())
    whole.view(-1)[::stride] = held.flatten()
    return whole
