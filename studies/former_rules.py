"""The rules for alpha that the study compared. They bisect for a target in nats; the library has another rule since."""

from __future__ import annotations

from collections.abc import Callable
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
_TOLERANCE = 0.005


def find_alpha(
    rule: str,
    model: LlamaForCausalLM,
    base: Path,
    respond: Callable[[LlamaForCausalLM], Sampled],
    target: float | None = None,
) -> float:
    """Find the largest alpha at which a rule's value is at most its target, by bisection.

    Args:
        rule: ``"auto"``, nats per response by which the fused model finds what the base sampled less likely than the
            base does; ``"support_retention"``, the same on those that solve the task; ``"kl_balance"``, the first
            less the same on the SFT model's own samples; ``"entropy_ratio"``, the share of token entropy lost.
        model: The SFT model; it is left as it was.
        base: The base's checkpoint.
        respond: Samples responses with the weights that the model holds.
        target: In the rule's unit, by default as in `TARGETS`.
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
