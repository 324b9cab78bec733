"""Registration with ``torch.library``: each op's schema, its fake, and which back end serves which device.

Ops are registered by ``Library.define``: the Python wrapper of ``torch.library.custom_op`` costs several times as
much per call, which would slow hooks on every layer. Every call goes through the dispatcher, so eager and compiled code
run the same path.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rejuv.ops import blocked
from lightning_rejuv.ops._inputs import accumulator_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACE = "lightning_rejuv"

SCHEMAS = (
    "activation_stats_(Tensor(a!) accumulator, Tensor h, Tensor? mask, float eps) -> ()",
    "grad_activation_stats_(Tensor(a!) accumulator, Tensor h, Tensor grad, Tensor? mask) -> ()",
    "weight_drift(Tensor weight, Tensor base) -> (Tensor, Tensor)",
    "token_partials(Tensor logits, Tensor? target, float temperature, Tensor? row_temperature, "
    "int vocab_start) -> (Tensor, Tensor)",
    "merge_token_partials(Tensor sums, Tensor ids) -> (Tensor, Tensor)",
)

#: The dtypes that the Triton kernels read. Any other tensor on a CUDA device takes the blocked back end.
KERNEL_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_library = torch.library.Library(NAMESPACE, "DEF")


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported, found without importing it."""
    return importlib.util.find_spec("triton") is not None


def has_kernel(*inputs: Tensor) -> bool:
    """Whether Triton is there and its kernels read the inputs' dtypes."""
    return triton_installed() and all(x.dtype in KERNEL_DTYPES for x in inputs)


def _activation_stats_cuda(accumulator: Tensor, h: Tensor, mask: Tensor | None, eps: float) -> None:
    if not has_kernel(h):
        return blocked.activation_stats_(accumulator, h, mask, eps)
    from lightning_rejuv.ops import triton_activation

    return triton_activation.activation_stats_(accumulator, h, mask, eps)


def _grad_activation_stats_cuda(accumulator: Tensor, h: Tensor, grad: Tensor, mask: Tensor | None) -> None:
    if not has_kernel(h, grad):
        return blocked.grad_activation_stats_(accumulator, h, grad, mask)
    from lightning_rejuv.ops import triton_activation

    return triton_activation.grad_activation_stats_(accumulator, h, grad, mask)


def _weight_drift_cuda(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    if not has_kernel(weight, base):
        return blocked.weight_drift(weight, base)
    from lightning_rejuv.ops import triton_drift

    return triton_drift.weight_drift(weight, base)


def _token_partials_cuda(
    logits: Tensor,
    target: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    vocab_start: int,
) -> tuple[Tensor, Tensor]:
    if not has_kernel(logits):
        return blocked.token_partials(logits, target, temperature, row_temperature, vocab_start)
    from lightning_rejuv.ops import triton_tokens

    return triton_tokens.token_partials(logits, target, temperature, row_temperature, vocab_start)


def _merge_token_partials_cuda(sums: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    if not triton_installed():
        return blocked.merge_token_partials(sums, ids)
    from lightning_rejuv.ops import triton_tokens

    return triton_tokens.merge_token_partials(sums, ids)


def _accumulate_fake(accumulator: Tensor, *_: Any) -> None:
    return None


def _weight_drift_fake(weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    wide = accumulator_dtype(weight.device)
    return weight.new_empty((4, weight.shape[0]), dtype=wide), weight.new_empty(
        (4, weight.shape[1]), dtype=wide
    )


def _token_partials_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty((4, rows), dtype=accumulator_dtype(logits.device)),
        logits.new_empty((rows,), dtype=torch.int64),
    )


def _merge_token_partials_fake(sums: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return sums.new_empty(sums.shape[1:]), ids.new_empty(ids.shape[1:])


# For each op: the function for every device, the one for CUDA and ROCm, and the fake.
BACKENDS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "activation_stats_": (blocked.activation_stats_, _activation_stats_cuda, _accumulate_fake),
    "grad_activation_stats_": (blocked.grad_activation_stats_, _grad_activation_stats_cuda, _accumulate_fake),
    "weight_drift": (blocked.weight_drift, _weight_drift_cuda, _weight_drift_fake),
    "token_partials": (blocked.token_partials, _token_partials_cuda, _token_partials_fake),
    "merge_token_partials": (
        blocked.merge_token_partials,
        _merge_token_partials_cuda,
        _merge_token_partials_fake,
    ),
}

for _schema in SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, (_every, _cuda, _fake) in BACKENDS.items():
    _library.impl(_name, _every, "CompositeExplicitAutograd")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

registered = torch.ops.lightning_rejuv
