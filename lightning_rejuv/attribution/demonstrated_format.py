"""Whether a model still speaks the format that the demonstrations have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_rejuv.attribution.confidence import Confidence
from lightning_rejuv.attribution.positions import SHARPENED
from lightning_rejuv.calibration.batches import Batch

#: A token may belong to the format if so large a share of the responses has it.
SHARED = 0.5


def format_probability(
    batches: Sequence[Batch], model: Sequence[Confidence], base: Sequence[Confidence]
) -> float:
    """Estimate how probable a model finds the format of demonstrations that its base did not know.

    The format is made of the tokens that at least half of the responses contain and that the base gave less than
    0.25, on average over all places where they stand: closing words, markers, tags. What differs from response to
    response, the answer itself, is not in it, and neither are words that are sometimes a surprise. A response
    needs all of them: the estimate is the mean probability of the least likely one, each after the demonstration
    before it. It is low as well if a demonstration is one of several ways to answer. If no token belongs to the format,
    it is 1: the base knows it.

    Args:
        batches: held-out demonstrations.
        model: the model's confidence on them.
        base: the base's confidence on them.

    >>> import torch
    >>> batch = Batch({}, torch.tensor([[7, 3], [7, 4]]), torch.ones(2, 2, dtype=torch.bool))
    >>> base, model = (
    ...     Confidence(torch.zeros(2, 2), torch.tensor(p).log())
    ...     for p in ([[0.01, 0.5], [0.02, 0.5]], [[0.6, 0.9], [0.4, 0.9]])
    ... )
    >>> round(format_probability([batch], [model], [base]), 2)  # of token 7
    0.5
    """
    responses = sum(len(batch.response) for batch in batches)
    having = torch.cat([row.unique() for batch in batches for row in _rows(batch)])
    tokens, counts = having.unique(return_counts=True)
    known, own = _mean_probabilities(batches, base), _mean_probabilities(batches, model)
    shared = tokens[counts >= SHARED * responses].tolist()
    return min((own[token] for token in shared if known[token] < SHARPENED), default=1.0)


def _rows(batch: Batch) -> Iterator[Tensor]:
    """Go through the response tokens of each row."""
    for targets, response in zip(batch.targets, batch.response, strict=True):
        yield targets[response]


def _mean_probabilities(batches: Sequence[Batch], confidences: Sequence[Confidence]) -> dict[int, float]:
    """Return the mean probability of each token over all response positions where it stands."""
    targets = torch.cat([batch.targets[batch.response] for batch in batches])
    probability = torch.cat([c.log_prob[b.response] for b, c in zip(batches, confidences, strict=True)]).exp()
    tokens, number, counts = targets.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=targets.device)
    sums.index_add_(0, number, probability.double())
    return dict(zip(tokens.tolist(), (sums / counts).tolist(), strict=True))
