"""What the tokens of the probe's responses cost a model."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.functional._positions import sum_and_count
from lightning_rejuv.metrics._mean import MeanMeasure


class TokenNLL(MeanMeasure):
    """Mean negative log-likelihood of tokens, nats, to be held against the token entropy on the same positions.

    As output of ``compute`` it returns a float32 scalar, NaN where no position was measured.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def update(self, logprobs: Tensor) -> None:
        """Add log-probabilities ``[...]`` of a batch's response tokens."""
        self.add(*sum_and_count(-logprobs, None))
