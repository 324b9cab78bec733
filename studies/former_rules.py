"""The rules for alpha that the study compared. The library has another one since.

All but one bisect for a target in nats. The other, ``"joint"``, needs none: it looks for the alpha at which what SFT
taught and what the base says itself are together most likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import LlamaForCausalLM

from lightning_rejuv.attribution import confidence, mean_entropy, nll_per_response
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.weights.blend import Blend
from lightning_rejuv.weights.open_targets import open_targets
from studies.measures import Sampled, verify

TARGETS = {"auto": 1.0, "support_retention": 2.0, "kl_balance": 0.0, "entropy_ratio": 0.5}
JOINT = "joint"
_TOLERANCE = 0.005
_EVALUATIONS = 12  # of the joint likelihood: they leave an interval of 0.005


def find_alpha(
    rule: str,
    model: LlamaForCausalLM,
    base: Path,
    respond: Callable[[LlamaForCausalLM], Sampled],
    target: float | None = None,
    demonstrations: Sequence[Sampled] = (),
) -> float:
    """Find the largest alpha at which a rule's value is at most its target, by bisection; or the joint one.

    Args:
        rule: ``"auto"``, nats per response by which the fused model finds what the base sampled less likely than the
            base does; ``"support_retention"``, the same on those that solve the task; ``"kl_balance"``, the first
            less the same on the SFT model's own samples; ``"entropy_ratio"``, the share of token entropy lost;
            ``"joint"``, the alpha at which `demonstrations` and what the base samples have the least sum of negative
            log-likelihoods, every response counting alike.
        model: The SFT model; it is left as it was.
        base: The base's checkpoint.
        respond: Samples responses with the weights that the model holds.
        target: In the rule's unit, by default as in `TARGETS`.
        demonstrations: Held-out demonstrations, for ``"joint"``.
    """
    targets = open_targets(model, base)
    with evaluation_mode(model), Blend(targets.fused, targets.base_of) as blend:

        def sampled(alpha: float) -> list[Batch]:
            blend.at(alpha)
            batch = respond(model)
            if rule == "support_retention":
                right = verify(batch)
                batch = {name: tensor[right] for name, tensor in batch.items()}
            return batches_for(model, [batch], "sampled")

        def nll(batches: list[Batch], alpha: float) -> float:
            blend.at(alpha)
            return nll_per_response([confidence(model, batch) for batch in batches])

        def entropy(batches: list[Batch], alpha: float) -> float:
            blend.at(alpha)
            return mean_entropy([confidence(model, batch) for batch in batches])

        own = sampled(0.0)
        if rule == JOINT:
            pooled = [*batches_for(model, list(demonstrations), "calibration"), *own]
            return golden_section(lambda alpha: nll(pooled, alpha))
        theirs = sampled(1.0) if rule == "kl_balance" else []
        floor = entropy(own, 0.0) if rule == "entropy_ratio" else nll(own, 0.0)
        other = nll(theirs, 1.0) if theirs else 0.0

        def value(alpha: float) -> float:
            if rule == "entropy_ratio":
                return 1 - entropy(own, alpha) / floor
            return nll(own, alpha) - floor - (nll(theirs, alpha) - other if theirs else 0.0)

        return bisect(value, TARGETS[rule] if target is None else target)


def bisect(value: Callable[[float], float], target: float) -> float:
    """The largest alpha that is tried at which a growing value is at most its target; 1 if that at 1 is.

    >>> round(bisect(lambda alpha: 4 * alpha**2, 1.0), 2)
    0.5
    """
    low, high = 0.0, 1.0
    if value(high) <= target:
        return high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) <= target else (low, middle)
    return low


def golden_section(value: Callable[[float], float]) -> float:
    """Where on [0, 1] a function with one minimum has it, within 0.0025, from 12 evaluations.

    >>> round(golden_section(lambda alpha: (alpha - 0.37) ** 2), 2)
    0.37
    """
    share = (5**0.5 - 1) / 2
    low, high = 0.0, 1.0
    left, right = high - share, low + share
    at_left, at_right = value(left), value(right)
    for _ in range(_EVALUATIONS - 2):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = value(right)
    low, high = (low, right) if at_left < at_right else (left, high)
    return (low + high) / 2
