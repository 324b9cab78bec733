"""How likely a model still finds what the base would say, averaged over responses."""

from __future__ import annotations

from torch import Tensor

from lightning_rejuv.functional.support_retention import _support_retention_check, _support_retention_update
from lightning_rejuv.metrics._mean import MeanMeasure


class SupportRetention(MeanMeasure):
    r"""Mean log-likelihood ratio on the base's own responses.

    See :func:`lightning_rejuv.functional.support_retention`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logprobs`` (Tensor): ``[B, T]``, the model's log-probabilities of the responses' tokens
    - ``base_logprobs`` (Tensor): ``[B, T]``, the base's
    - ``mask`` (Tensor, optional): ``[B, T]`` bool, the responses' tokens

    As output of ``compute`` it returns a float32 scalar, nats per response; NaN where no response was given.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: wrong rank or differing shapes.
        TypeError: not floating.

    Example::
        >>> import torch
        >>> metric = SupportRetention()
        >>> metric.update(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-1.0, -1.0]]))
        >>> metric.compute()
        tensor(-2.)
    """

    higher_is_better: bool | None = True

    def update(self, logprobs: Tensor, base_logprobs: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of responses."""
        _support_retention_check(logprobs, base_logprobs, mask)
        self.add(*_support_retention_update(logprobs, base_logprobs, mask))
