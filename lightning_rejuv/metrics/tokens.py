"""Measures of next-token distributions and of responses' likelihoods, averaged over tokens or over responses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_rejuv.functional._checks import check_positive
from lightning_rejuv.functional.tokens import (
    _entropy_gap_check,
    _entropy_gap_update,
    _logits_check,
    _support_retention_check,
    _support_retention_update,
    _token_entropy_update,
    _top1_confidence_update,
    sum_and_count,
)
from lightning_rejuv.metrics._measure import MeanMeasure


class AtTemperature(MeanMeasure):
    """A mean over positions of what the distribution at a sampling temperature has."""

    def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("temperature", temperature)
        self.temperature = temperature


class TokenEntropy(AtTemperature):
    r"""Mean next-token entropy in nats; see :func:`lightning_rejuv.functional.token_entropy`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logits`` (Tensor): ``[..., V]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the positions to measure

    As output of ``compute`` it returns a float32 scalar, NaN if no position was measured or if a
    measured one holds NaN logits.

    Args:
        temperature: the sampling temperature.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``temperature`` is not positive, or shapes do not fit.
        TypeError: the mask is floating, or the logits are not.

    Example::
        >>> import torch
        >>> metric = TokenEntropy()
        >>> metric.update(torch.zeros(2, 3, 4), torch.tensor([[True, True, False], [False, False, False]]))
        >>> metric.compute()
        tensor(1.3863)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0

    def update(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; a batch that is all padding adds nothing."""
        _logits_check(logits, mask, self.temperature)
        self.add(*_token_entropy_update(logits, mask, self.temperature))


class Top1Confidence(AtTemperature):
    r"""Mean largest probability; see :func:`lightning_rejuv.functional.top1_confidence`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logits`` (Tensor): ``[..., V]``, floating
    - ``mask`` (Tensor, optional): ``[...]`` bool, the positions to measure

    As output of ``compute`` it returns a float32 scalar, NaN if no position was measured.

    Args:
        temperature: the sampling temperature.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``temperature`` is not positive, or shapes do not fit.
        TypeError: the mask is floating, or the logits are not.

    Example::
        >>> import torch
        >>> metric = Top1Confidence()
        >>> metric.update(torch.zeros(2, 3, 4))
        >>> metric.compute()
        tensor(0.2500)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def update(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; a batch that is all padding adds nothing."""
        _logits_check(logits, mask, self.temperature)
        self.add(*_top1_confidence_update(logits, mask, self.temperature))


class EntropyGap(AtTemperature):
    r"""Mean absolute entropy gap to the base; see :func:`lightning_rejuv.functional.entropy_gap`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logits`` (Tensor): ``[..., V]``, floating
    - ``base_logits`` (Tensor): ``[..., V']``, those of the base at the same positions
    - ``mask`` (Tensor, optional): ``[...]`` bool, the positions to measure

    As output of ``compute`` it returns a float32 scalar in nats, NaN if no position was measured.

    Args:
        temperature: the sampling temperature of both models.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``temperature`` is not positive, or shapes do not fit.
        TypeError: the mask is floating, or the logits are not.

    Example::
        >>> import torch
        >>> metric = EntropyGap()
        >>> metric.update(torch.zeros(1, 2), torch.zeros(1, 8))
        >>> metric.compute()
        tensor(1.3863)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def update(self, logits: Tensor, base_logits: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; a batch that is all padding adds nothing."""
        _entropy_gap_check(logits, base_logits, mask, self.temperature)
        self.add(*_entropy_gap_update(logits, base_logits, mask, self.temperature))


class SupportRetention(MeanMeasure):
    r"""Mean log-likelihood ratio on the base's own responses.

    See :func:`lightning_rejuv.functional.support_retention`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``logprobs`` (Tensor): ``[B, T]``, the model's log-probabilities of the responses' tokens
    - ``base_logprobs`` (Tensor): ``[B, T]``, those of the base
    - ``mask`` (Tensor, optional): ``[B, T]`` bool, the responses' tokens

    As output of ``compute`` it returns a float32 scalar, nats per response; NaN if no response was given.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: log-probabilities have another rank, or differ in shape.
        TypeError: they are not floating.

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


class TokenNLL(MeanMeasure):
    """Mean negative log-likelihood of the probe's response tokens, nats, at the positions of their entropy.

    As output of ``compute`` it returns a float32 scalar, NaN if no position was measured.
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    def update(self, logprobs: Tensor) -> None:
        """Add the log-probabilities ``[...]`` of a batch's response tokens."""
        self.add(*sum_and_count(-logprobs, None))
