"""Which back ends the conformance suite holds to the reference in this process."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class Backend(NamedTuple):
    """The functions of one back end, on the device whose tensors it takes."""

    name: str
    device: str
    functions: object


def _blocked() -> Backend:
    from lightning_rejuv.ops import blocked

    return Backend("blocked", "cpu", blocked)


def _interpreter() -> Backend:
    """Triton's kernels on CPU tensors; the environment variable was set before Triton was imported."""
    from types import SimpleNamespace

    from lightning_rejuv.ops import triton_activation, triton_drift, triton_tokens

    functions = SimpleNamespace(
        activation_stats_=triton_activation.activation_stats_,
        grad_activation_stats_=triton_activation.grad_activation_stats_,
        weight_drift=triton_drift.weight_drift,
        token_partials=triton_tokens.token_partials,
        merge_token_partials=triton_tokens.merge_token_partials,
    )
    return Backend("triton interpreter", "cpu", functions)


def _cuda() -> Backend:
    import lightning_rejuv.ops  # noqa: F401  registers the ops

    return Backend("cuda", "cuda", torch.ops.lightning_rejuv)


def backends() -> list[Backend]:
    """The interpreted kernels where Triton interprets, otherwise the blocked code and a GPU's kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [_interpreter()]
    return [_blocked(), *([_cuda()] if torch.cuda.is_available() else [])]
