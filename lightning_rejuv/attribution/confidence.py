"""How sure a model is of every response token, before and after SFT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.functional._checks import check_logits
from lightning_rejuv.logits import stats_at


@dataclass(frozen=True)
class Confidence:
    """How sure a model is at every position of one batch; NaN outside the response.

    Attributes:
        entropy: [B, T - 1] float64 (float32 on MPS), nats, of the next-token distribution.
        log_prob: [B, T - 1] float64 (float32 on MPS), nats, of the target token.
    """

    entropy: Tensor
    log_prob: Tensor


def confidence(model: nn.Module, batch: Batch) -> Confidence:
    """Teacher-force a batch and measure entropy and target log-probability on its response.

    They are taken as :func:`lightning_rejuv.logits.stats_at` does.

    Args:
        model: in eval mode, on the batch's device.
        batch: a calibration batch.

    Raises:
        TypeError: the model returns no logits over a vocabulary that holds the targets.
        ValueError: logits of a response position are NaN or +inf.
    """
    stats = stats_at(model, batch.inputs, batch.predicting, batch.targets[batch.response])
    check_logits("logits", stats.entropy, None)
    assert stats.logprob is not None
    return Confidence(_spread(stats.entropy, batch.response), _spread(stats.logprob, batch.response))


def _spread(values: Tensor, response: Tensor) -> Tensor:
    """Put one value for each response position where it belongs; NaN elsewhere."""
    full = values.new_full(response.shape, float("nan"))
    full[response] = values
    return full


def mean_entropy(confidences: list[Confidence]) -> float:
    """Mean token entropy over all response positions of all batches, nats."""
    values = torch.cat([c.entropy[~c.entropy.isnan()] for c in confidences])
    return float(values.double().mean())


def mean_nll(confidences: list[Confidence]) -> float:
    """Mean negative log-likelihood over all response positions of all batches, nats."""
    values = torch.cat([-c.log_prob[~c.log_prob.isnan()] for c in confidences])
    return float(values.double().mean())


def nll_per_response(confidences: list[Confidence]) -> float:
    """Mean over responses of the summed negative log-likelihood, nats per response."""
    values = torch.cat([-c.log_prob.nansum(dim=1) for c in confidences])
    return float(values.double().mean())
