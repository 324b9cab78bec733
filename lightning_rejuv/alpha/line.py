"""The search for alpha on a model: likelihoods along the line from its anchor, and a few rollouts at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.alpha.doubts import doubt_few, doubt_seen, doubt_swapped, doubt_unfinished
from lightning_rejuv.alpha.search import (
    FIRST,
    GRID,
    AlphaPoint,
    AlphaSearch,
    choose_alpha,
    is_clear,
    with_rollouts,
)
from lightning_rejuv.attribution import (
    Confidence,
    confidence,
    format_probability,
    mean_entropy,
    mean_nll,
    nll_per_response,
)
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.calibration.bounded import MAX_RESPONSES, bounded, check_batches
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.forward import lent
from lightning_rejuv.progress import advance, phase
from lightning_rejuv.verifier import are_right, ask
from lightning_rejuv.weights.blend import Blend

Sampler = Callable[[nn.Module], Iterable[Any]]
Verifier = Callable[[Mapping[str, Tensor]], Tensor]
#: From a sampled batch, and how messages name it, to which of its responses are right.
Judge = Callable[[Mapping[str, Tensor], str], list[bool]]


def find_alpha(
    model: nn.Module,
    blend: Blend,
    demonstrations: list[Batch],
    own: list[Any],
    *,
    sampler: Sampler | None = None,
    judge: Judge | None = None,
    ends: dict[float, list[Confidence]] | None = None,
) -> AlphaSearch:
    """Find alpha with no RL run, by :func:`lightning_rejuv.alpha.choose_alpha`.

    The model is evaluated on the demonstrations and on what the anchor sampled, at the alphas of
    :data:`lightning_rejuv.alpha.search.FIRST`, and at the others of ``GRID`` if those leave a doubt. With a judge
    responses are sampled at the alpha that was found; if it judges at least 32 and none is right, alpha is raised.

    Args:
        model: the SFT model in eval mode.
        blend: entered for ``model``.
        demonstrations: held-out ones, of the kind that SFT trained on.
        own: what :func:`sample_base` returned.
        sampler: called with the model while it holds the weights to sample from; needed with a judge.
        judge: says which of some responses are right, see :func:`judge_by`.
        ends: how sure the base (0.0) and the SFT model (1.0) are on the demonstrations, as far as it is known; what is
            not is added.

    Raises:
        NoAlpha: as ``choose_alpha``.
        ValueError: no response was sampled, by the base or at an alpha to be checked, ``finished`` does not say one
            thing of each, or the judge cannot tell which are right.
        RuntimeError: a verifier failed.
    """
    batches, unfinished = batches_for(model, own, "sampled"), count_unfinished(own)
    ends = {} if ends is None else ends
    curve: list[AlphaPoint] = []

    def look_at(alphas: Sequence[float], what: str) -> None:
        known = sum(alpha in ends for alpha in alphas)
        passes = len(alphas) * (len(demonstrations) + len(batches)) - known * len(demonstrations)
        with phase(what, passes):
            for alpha in alphas:
                blend.at(alpha)
                found = ends.get(alpha) or [confidence(model, batch) for batch in demonstrations]
                if alpha in (0.0, 1.0):
                    ends[alpha] = found
                sampled = nll_per_response([confidence(model, batch) for batch in batches])
                form = format_probability(demonstrations, found, ends[0.0])
                curve.append(AlphaPoint(alpha, nll_per_response(found), sampled, form, mean_entropy(found)))
        curve.sort(key=lambda point: point.alpha)

    look_at(FIRST, "searching for alpha")
    if not is_clear(curve):
        look_at([alpha for alpha in GRID if alpha not in FIRST], "looking closer for alpha")
    taught, responses = (sum(len(batch.response) for batch in some) for some in (demonstrations, batches))
    search = replace(choose_alpha(curve), responses=responses, unfinished=unfinished)
    if judge is not None and sampler is not None:

        def right_at(alpha: float) -> tuple[int, int]:
            samples = _samples(model, blend, sampler, alpha)
            if not samples:
                raise ValueError(
                    f"Expected the sampler to return responses at alpha {alpha:g} too, which are to be judged, but "
                    "it returned none. Return as many as of the base, or leave the verifier out."
                )
            batches_for(model, samples, "sampled")
            with lent(model):
                return _right(samples, judge)

        search = with_rollouts(search, right_at)
    first, last = curve[0], curve[-1]
    nll, entropy = (first.demonstrations, last.demonstrations), (first.entropy, last.entropy)
    doubts = (
        *doubt_swapped(nll, entropy),
        *doubt_seen(mean_nll(ends[1.0]), entropy),
        *doubt_few(taught, responses),
        *doubt_unfinished(responses, unfinished),
        *search.doubts,
    )
    return replace(search, doubts=doubts)


def judge_by(verifier: Verifier) -> Judge:
    """Return the judge that asks a verifier about each batch: from it to [B] bool, which responses are right."""

    def judge(batch: Mapping[str, Tensor], where: str) -> list[bool]:
        return are_right(ask(verifier, batch, about=where), _rows(batch), where)

    return judge


def sample_base(model: nn.Module, blend: Blend, sampler: Sampler) -> list[Any]:
    """Return the batches that a sampler returns with the base's weights in the model.

    Raises:
        TypeError: what it returns is no iterable of batches.
    """
    return _samples(model, blend, sampler, 0.0)


def _samples(model: nn.Module, blend: Blend, sampler: Sampler, alpha: float) -> list[Any]:
    blend.at(alpha)
    with lent(model):  # until the last batch has been read, since a generator samples while it is read
        return _read(sampler(model))


def _read(samples: Any) -> list[Any]:
    check_batches(samples, "sampled")
    return list(bounded(samples, "sampled", MAX_RESPONSES, _rows))


def _rows(batch: Any) -> int:
    """Return how many rows a batch has: one if it is a row of a dataset, or if it will be refused."""
    try:
        shape = torch.as_tensor(batch["input_ids"]).shape
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return 1
    return shape[0] if len(shape) > 1 else 1


def count_unfinished(samples: list[Any]) -> int | None:
    """Count the responses that came to no end-of-sequence token; None unless all batches say so (``finished``)."""
    if not all(isinstance(batch, Mapping) and "finished" in batch for batch in samples):
        return None
    return sum(_cut_off(batch, f"sampled batch {number}") for number, batch in enumerate(samples))


def _cut_off(batch: Mapping[str, Any], where: str) -> int:
    rows, got = _rows(batch), batch["finished"]
    try:
        finished = torch.as_tensor(got)
        got = f"shape {tuple(finished.shape)}"
        fits = finished.dim() <= 1 and finished.numel() == rows
        if fits and not bool(((finished == 0) | (finished == 1)).all()):
            fits, got = False, f"{finished.tolist()}"
    except (TypeError, ValueError, RuntimeError):
        fits, got = False, repr(got)
    if not fits:
        raise ValueError(
            f"Expected `finished` of {where} to be one bool for each of its {rows} rows, which of them came to their "
            f"end, but got {got:.200}. Leave it out of all batches if the sampler cannot tell."
        )
    return int((finished == 0).sum())


def _right(samples: list[Any], judge: Judge) -> tuple[int, int]:
    """Return how many of some responses are right, and how many were judged."""
    right, total = 0, sum(map(_rows, samples))
    with phase("checking responses", total):
        for number, batch in enumerate(samples):
            right += sum(judge(batch, f"sampled batch {number}"))
            advance(_rows(batch))
    return right, total
