"""What the base itself gives on the probe: every ratio is taken on the same positions."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Reference:
    """The base on the probe and on its own samples.

    Attributes:
        values: the base's measures by name.
        entropy: per probe batch the entropies ``[positions]``, nats.
        logprobs: per batch of samples the log-probabilities ``[B, T - 1]`` of its tokens.
    """

    values: dict[str, float] = field(default_factory=dict)
    entropy: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
