"""The automatic alphas: what each rule measures on a model that is blended with its anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.access.edit import Blend
from lightning_rejuv.alpha import EVALUATIONS, AlphaSearch, default_target, search_alpha
from lightning_rejuv.attribution import confidence, mean_entropy, nll_per_response
from lightning_rejuv.bounded import MAX_RESPONSES, bounded, check_batches
from lightning_rejuv.calibration import Batch
from lightning_rejuv.calibration_checks import batches_for
from lightning_rejuv.progress import phase

Sampler = Callable[[nn.Module], Iterable[Any]]
Verifier = Callable[[Mapping[str, Tensor]], Tensor]


def find_alpha(
    model: nn.Module,
    blend: Blend,
    rule: str,
    sampler: Sampler,
    *,
    target: float | None = None,
    verifier: Verifier | None = None,
) -> AlphaSearch:
    """Find alpha with no RL run: by what fusion does to responses that the anchor samples itself.

    Over-training takes the anchor's alternatives away; a fusion has to keep them likely enough to be
    sampled during RL. ``"auto"`` bounds how much less likely, in nats per response, the fused model finds
    what the anchor samples than the anchor does; ``"support_retention"`` does so on the responses that a
    verifier accepts; ``"kl_balance"`` makes the fused model equally far from both parents, each on its own
    responses; ``"entropy_ratio"`` bounds the share of token entropy that is lost.

    Args:
        model: the SFT model in eval mode.
        blend: entered for ``model``.
        rule: one of :data:`lightning_rejuv.alpha.ALPHA_RULES`.
        sampler: called with the model while it holds the weights to sample from; returns batches.
        target: what the rule's value may reach; the rule's default by default.
        verifier: for ``"support_retention"``: from a sampled batch to [B] bool, which responses are right.

    Raises:
        ValueError: no response, or none that the verifier accepts.
    """
    own = _samples(model, blend, sampler, 0.0)
    if rule == "support_retention":
        assert verifier is not None
        own = _verified(own, verifier)
    batches = batches_for(model, own, "sampled")
    if target is None:
        tokens = sum(int(b.response.sum()) for b in batches) / sum(len(b.response) for b in batches)
        target = default_target(rule, tokens)

    with phase("searching for alpha", EVALUATIONS * len(batches)):
        return _search(model, blend, rule, sampler, batches, target)


def _search(
    model: nn.Module, blend: Blend, rule: str, sampler: Sampler, batches: list[Batch], target: float
) -> AlphaSearch:
    if rule == "entropy_ratio":
        floor = _entropy(model, blend, batches, 0.0)
        return search_alpha(lambda a: 1 - _entropy(model, blend, batches, a) / floor, target, rule)
    excess = _excess(model, blend, batches, 0.0)
    if rule == "kl_balance":
        theirs = _excess(
            model, blend, batches_for(model, _samples(model, blend, sampler, 1.0), "sampled"), 1.0
        )
        return search_alpha(lambda a: excess(a) - theirs(a), target, rule)
    return search_alpha(excess, target, rule)


def _samples(model: nn.Module, blend: Blend, sampler: Sampler, alpha: float) -> list[Any]:
    blend.at(alpha)
    samples = sampler(model)
    check_batches(samples, "sampled")
    return list(bounded(samples, "sampled", MAX_RESPONSES, _rows))


def _rows(batch: Any) -> int:
    return len(batch["input_ids"]) if isinstance(batch, Mapping) and "input_ids" in batch else 1


def _verified(samples: list[Any], verifier: Verifier) -> list[dict[str, Any]]:
    right = []
    for number, batch in enumerate(samples):
        rows = _rows(batch)
        keep = torch.as_tensor(verifier(batch)).to(torch.bool)
        if keep.shape != (rows,):
            raise ValueError(
                f"Expected the verifier to return one bool for each of the {rows} rows of sampled batch {number} but "
                f"got shape {tuple(keep.shape)}."
            )
        if bool(keep.any()):
            right.append({name: _kept(value, keep) for name, value in batch.items()})
    if not right:
        raise ValueError(
            'Expected at least one verified response for `alpha="support_retention"` but the verifier '
            'accepts none of what the anchor sampled. Sample more prompts, or use `alpha="auto"`, which '
            "needs no verifier."
        )
    return right


def _kept(value: Any, keep: Tensor) -> Any:
    """Return some rows of a tensor that has one for each response, and anything else as it is."""
    by_row = isinstance(value, Tensor) and value.dim() and len(value) == len(keep)
    return value[keep.to(value.device)] if by_row and not bool(keep.all()) else value


def _entropy(model: nn.Module, blend: Blend, batches: list[Batch], alpha: float) -> float:
    blend.at(alpha)
    return mean_entropy([confidence(model, batch) for batch in batches])


def _excess(
    model: nn.Module, blend: Blend, batches: list[Batch], own_alpha: float
) -> Callable[[float], float]:
    """NLL per response in excess of what the model that sampled the responses gives them."""

    def nll(alpha: float) -> float:
        blend.at(alpha)
        return nll_per_response([confidence(model, batch) for batch in batches])

    floor = nll(own_alpha)
    return lambda alpha: nll(alpha) - floor
