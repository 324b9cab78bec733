"""How sure a model is of every response token, before and after SFT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.config import WITHOUT_CALIBRATION
from lightning_rejuv.forward import forward_logits
from lightning_rejuv.functional.tokens import token_entropy

# Rows of logits that are taken through float32 at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Confidence:
    """How sure a model is at every position of one batch; NaN outside the response.

    Attributes:
        entropy: [B, T - 1] float32, nats, of the next-token distribution.
        log_prob: [B, T - 1] float32, nats, of the target token.
    """

    entropy: Tensor
    log_prob: Tensor


@torch.no_grad()
def confidence(model: nn.Module, batch: Batch) -> Confidence:
    """Teacher-force a batch and measure entropy and target log-probability on its response.

    Args:
        model: in eval mode, on the batch's device.
        batch: a calibration batch.

    Raises:
        TypeError: the model returns no logits over a vocabulary that holds the targets.
    """
    logits = forward_logits(model, batch.inputs)[:, :-1][batch.response]
    targets = batch.targets[batch.response]
    if int(targets.max()) >= logits.shape[-1]:
        raise TypeError(
            f"Expected {type(model).__name__} to be a language model, with a logit for each token of its vocabulary, "
            f"but it returns {logits.shape[-1]} for token {int(targets.max())}. For another model pass "
            f"{WITHOUT_CALIBRATION}; or `loss` for a reset."
        )
    entropy, log_prob = [], []
    for rows, target in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        entropy.append(token_entropy(exact, reduction="none"))
        log_prob.append(-torch.nn.functional.cross_entropy(exact, target, reduction="none"))
    return Confidence(_spread(entropy, batch.response), _spread(log_prob, batch.response))


def _spread(values: list[Tensor], response: Tensor) -> Tensor:
    joined = torch.cat(values)
    full = joined.new_full(response.shape, float("nan"))
    full[response] = joined
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
