"""The search for alpha on a model: likelihoods along the line from its anchor, and a few rollouts at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.access.edit import Blend
from lightning_rejuv.alpha import GRID, AlphaPoint, AlphaSearch, choose_alpha, doubt_samples, with_rollouts
from lightning_rejuv.attribution import Confidence, confidence, format_probability, nll_per_response
from lightning_rejuv.bounded import MAX_RESPONSES, bounded, check_batches
from lightning_rejuv.calibration import Batch
from lightning_rejuv.calibration_checks import batches_for
from lightning_rejuv.progress import phase

Sampler = Callable[[nn.Module], Iterable[Any]]
Verifier = Callable[[Mapping[str, Tensor]], Tensor]


def find_alpha(
    model: nn.Module,
    blend: Blend,
    demonstrations: list[Batch],
    own: list[Any],
    *,
    sampler: Sampler | None = None,
    verifier: Verifier | None = None,
) -> AlphaSearch:
    """Find alpha with no RL run, by :func:`lightning_rejuv.alpha.choose_alpha`.

    The model is evaluated at each alpha of :data:`lightning_rejuv.alpha.GRID`, on the demonstrations and on what the
    anchor sampled. With a verifier responses are sampled at the alpha that was found; if none is right it is raised.

    Args:
        model: the SFT model in eval mode.
        blend: entered for ``model``.
        demonstrations: held-out ones, of the kind that SFT trained on.
        own: what :func:`sample_base` returned.
        sampler: called with the model while it holds the weights to sample from; needed with a verifier.
        verifier: from a sampled batch to [B] bool, which responses are right.

    Raises:
        ValueError: as ``choose_alpha``; no response was sampled, or the verifier does not answer for each.
    """
    batches = batches_for(model, own, "sampled")
    base: list[Confidence] = []
    curve = []
    with phase("searching for alpha", len(GRID) * (len(demonstrations) + len(batches))):
        for alpha in GRID:
            blend.at(alpha)
            found = [confidence(model, batch) for batch in demonstrations]
            base = base or found
            sampled = nll_per_response([confidence(model, batch) for batch in batches])
            form = format_probability(demonstrations, found, base)
            curve.append(AlphaPoint(alpha, nll_per_response(found), sampled, form))
    responses, unfinished = sum(len(batch.response) for batch in batches), count_unfinished(own)
    search = choose_alpha(curve)
    search = replace(
        search,
        responses=responses,
        unfinished=unfinished,
        doubts=(*search.doubts, *doubt_samples(responses, unfinished)),
    )
    if verifier is None or sampler is None:
        return search

    def right_at(alpha: float) -> float:
        return _right(_samples(model, blend, sampler, alpha), verifier)

    return with_rollouts(search, right_at, responses)


def sample_base(model: nn.Module, blend: Blend, sampler: Sampler) -> list[Any]:
    """Return the batches that a sampler returns with the base's weights in the model.

    Raises:
        TypeError: what it returns is no iterable of batches.
    """
    return _samples(model, blend, sampler, 0.0)


def _samples(model: nn.Module, blend: Blend, sampler: Sampler, alpha: float) -> list[Any]:
    blend.at(alpha)
    samples = sampler(model)
    check_batches(samples, "sampled")
    return list(bounded(samples, "sampled", MAX_RESPONSES, _rows))


def _rows(batch: Any) -> int:
    return len(batch["input_ids"]) if isinstance(batch, Mapping) and "input_ids" in batch else 1


def count_unfinished(samples: list[Any]) -> int | None:
    """Count the responses that came to no end-of-sequence token; None unless all batches say so (``finished``)."""
    if not all(isinstance(batch, Mapping) and "finished" in batch for batch in samples):
        return None
    return sum(int((~torch.as_tensor(batch["finished"]).bool()).sum()) for batch in samples)


def _right(samples: list[Any], verifier: Verifier) -> float:
    """Return the share of some responses that a verifier accepts."""
    right = total = 0
    for number, batch in enumerate(samples):
        rows = _rows(batch)
        accepted = torch.as_tensor(verifier(batch)).to(torch.bool)
        if accepted.shape != (rows,):
            raise ValueError(
                f"Expected the verifier to return one bool for each of the {rows} rows of sampled batch {number} but "
                f"got shape {tuple(accepted.shape)}."
            )
        right, total = right + int(accepted.sum()), total + rows
    return right / max(1, total)
