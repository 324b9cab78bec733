"""Fused statistics: one meaning (``reference``), several back ends, chosen by the tensor's device.

Registered with ``torch.library`` as ``torch.ops.lightning_rejuv.*``: usable inside
``torch.compile(fullgraph=True)``. Triton is imported by the first CUDA call and by nothing else.
"""

from lightning_rejuv.ops.activation import (
    ActivationStats,
    GradActivationStats,
    activation_stats,
    grad_activation_stats,
    merge_activation_stats,
)
from lightning_rejuv.ops.drift import DriftStats, WeightDrift, weight_drift
from lightning_rejuv.ops.linear_tokens import token_stats_from_hidden
from lightning_rejuv.ops.recompute import is_recomputing
from lightning_rejuv.ops.tokens import (
    TokenPartials,
    TokenStats,
    merge_token_stats,
    token_partials,
    token_stats,
)

__all__ = [
    "ActivationStats",
    "DriftStats",
    "GradActivationStats",
    "TokenPartials",
    "TokenStats",
    "WeightDrift",
    "activation_stats",
    "grad_activation_stats",
    "is_recomputing",
    "merge_activation_stats",
    "merge_token_stats",
    "token_partials",
    "token_stats",
    "token_stats_from_hidden",
    "weight_drift",
]
