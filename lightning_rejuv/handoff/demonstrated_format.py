"""Whether a model still speaks the format that the demonstrations have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lightning_rejuv.attribution.confidence import Confidence
from lightning_rejuv.attribution.positions import SHARPENED
from lightning_rejuv.calibration import Batch

#: A token belongs to the format if so large a share of the responses has it where the base did not expect it.
SHARED = 0.5


def format_probability(
    batches: Sequence[Batch], model: Sequence[Confidence], base: Sequence[Confidence]
) -> float:
    """Estimate how probable a model finds the format of demonstrations that its base did not know.

    The format is made of the tokens that at least half of the responses contain at positions where the base gave
    them p < 0.25: closing words, markers, tags. What differs from response to response, the answer itself, is
    not in it. The probability of a response's format is the product over those positions, each after the
    demonstration up to there; the estimate is the mean over responses, and a lower bound where there
    are several ways to answer. Without such a token it is 1: the base knows the format.

    Args:
        batches: held-out demonstrations.
        model: the model's confidence on them.
        base: the base's.

    >>> import torch
    >>> batch = Batch({}, torch.tensor([[7, 3], [7, 4]]), torch.ones(2, 2, dtype=torch.bool))
    >>> base, model = (
    ...     Confidence(torch.zeros(2, 2), torch.tensor(p).log())
    ...     for p in ([[0.01, 0.5], [0.02, 0.5]], [[0.6, 0.9], [0.4, 0.9]])
    ... )
    >>> round(format_probability([batch], [model], [base]), 2)  # of token 7
    0.5
    """
    unknown = [
        batch.response & (known.log_prob < math.log(SHARPENED))
        for batch, known in zip(batches, base, strict=True)
    ]
    responses = sum(len(batch.response) for batch in batches)
    having = Counter(
        token
        for batch, where in zip(batches, unknown, strict=True)
        for targets, chosen in zip(batch.targets, where, strict=True)
        for token in set(targets[chosen].tolist())
    )
    shared = {token for token, count in having.items() if count >= SHARED * responses}
    total = 0.0
    for batch, where, own in zip(batches, unknown, model, strict=True):
        for targets, chosen, log_prob in zip(batch.targets, where, own.log_prob, strict=True):
            pairs = zip(targets[chosen].tolist(), log_prob[chosen].tolist(), strict=True)
            total += math.exp(sum(value for token, value in pairs if token in shared))
    return total / responses
