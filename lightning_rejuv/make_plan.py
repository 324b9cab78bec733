"""Deciding what a rejuvenation changes, and checking that it can, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lightning_rejuv.alpha.line import count_unfinished, find_alpha, judge_by, sample_base
from lightning_rejuv.alpha.search import AlphaSearch
from lightning_rejuv.attribution import (
    Attribution,
    Comparison,
    Confidence,
    attribute,
    attribute_entropy,
    attribute_loss,
    check_reconstruction,
    compare,
    select_neurons,
)
from lightning_rejuv.attribution.selection import count_of
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.config import WITHOUT_CALIBRATION, Options, Reset, alpha_by_name
from lightning_rejuv.data import Data
from lightning_rejuv.forward import check_gradients_possible, evaluation_mode
from lightning_rejuv.names import listing
from lightning_rejuv.neurons import Decoder, NeuronGroup, find_decoder, output_rows
from lightning_rejuv.plan import GroupReset, Plan
from lightning_rejuv.progress import phase
from lightning_rejuv.refit import RefitReport, check_refit, try_refit
from lightning_rejuv.weights.blend import Blend
from lightning_rejuv.weights.buffers import check_finite_buffers
from lightning_rejuv.weights.drift import Drift, check_finite
from lightning_rejuv.weights.targets import Targets


@dataclass(frozen=True)
class Findings:
    """What was seen while a plan was made; empty on a process that did not make it.

    Attributes:
        drift: how far the model is from its anchor before the edit.
        batches: the calibration set on the model's device, if the entropy is to be measured again after the edit.
        comparison: what it said; None without one.
        attribution: the neurons' contributions; None for fusion alone.
        search: how alpha was found; None if it was given.
        refit: the training steps after the edit; None without them.
    """

    drift: Mapping[str, Drift] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    comparison: Comparison | None = None
    attribution: Attribution | None = None
    search: AlphaSearch | None = None
    refit: RefitReport | None = None


def make_plan(model: nn.Module, targets: Targets, data: Data, options: Options) -> tuple[Plan, Findings]:
    """Check a model, its anchor and the calibration data, and decide what to change; change nothing.

    Args:
        model: the SFT model.
        targets: what fusion edits, matched with the anchor.
        data: what the caller brings.
        options: what is wanted.

    Raises:
        ValueError: as :func:`lightning_rejuv.rejuvenate`.
    """
    reset = options.reset
    if reset is not None or options.refit is not None:
        check_gradients_possible(model)
    check_refit(targets, options)
    check_dora(targets, options)
    decoder = find_decoder(model) if reset and data.loss is None else None
    groups = decoder.groups if decoder else output_rows(model, targets.fused) if reset else ()
    data.check_enough(model, options)
    batches = data.batches(model, options)
    samplers = data.samplers(batches, options, targets.base_ends) if options.samples_the_base else None
    given = options.alpha if not isinstance(options.alpha, str) else 0.0
    alphas = alpha_by_name(given, list(targets.fused))
    drift = targets.measure()
    check_finite(drift, targets.description)
    check_finite_buffers(targets.buffers, targets.anchor_of, targets.description)

    search: AlphaSearch | None = None
    comparison: Comparison | None = None
    attribution: Attribution | None = None
    ends: dict[float, list[Confidence]] = {}
    samples: list[Batch] = []
    unfinished: int | None = None
    if options.runs_the_model:
        with evaluation_mode(model), Blend(targets.fused, targets.base_of) as blend:
            own = sample_base(model, blend, samplers[1]) if samplers else []
            if options.refit is not None:
                samples, unfinished = batches_for(model, own, "sampled"), count_unfinished(own)
            if samplers and options.searches_alpha:
                judge = judge_by(data.verifier) if data.verifier is not None else None
                search = find_alpha(model, blend, batches, own, sampler=samplers[0], judge=judge, ends=ends)
                alphas = alpha_by_name(search.alpha, list(targets.fused))
            if reset and decoder:
                rule, count = reset.positions, reset.positions_per_response
                comparison = compare(model, blend, batches, rule, count, targets.reference, ends)
                with phase("attributing to neurons", len(batches)):
                    attribution = _attribute(
                        model, decoder, blend, alphas, targets, batches, comparison, reset
                    )
            elif reset:
                blend.at(1.0)
                assert data.loss is not None
                assert data.calibration is not None  # not by its truth: a stream has no length
                attribution = attribute_loss(model, groups, data.calibration, data.loss)
            elif search:
                comparison = Comparison([], search.curve[0].entropy, search.curve[-1].entropy)
    plan = Plan(
        search.alpha if search else given,
        alphas,
        _select(groups, attribution, reset, options.seed) if reset and attribution else [],
    )
    refit = None
    if options.refit is not None:
        moves, refit = try_refit(model, targets, plan, batches, samples, unfinished, options)
        plan = replace(plan, moves=moves)
    return plan, Findings(drift, batches if comparison else [], comparison, attribution, search, refit)


def check_dora(targets: Targets, options: Options) -> None:
    """Refuse more than a fusion by a number if parameters are fused by no lerp of their own (DoRA).

    Raises:
        ValueError: the options ask for a reset, a search or a refit.
    """
    if targets.dora and options.runs_the_model:
        raise ValueError(
            f"Expected {WITHOUT_CALIBRATION} with DoRA adapters, which can be fused but "
            "not reset, searched or refitted in place. For more call `model.merge_and_unload()` and pass the base "
            "as `anchor`."
        )


def _attribute(
    model: nn.Module,
    decoder: Decoder,
    blend: Blend,
    alphas: dict[str, float],
    targets: Targets,
    batches: list[Batch],
    comparison: Comparison,
    reset: Reset,
) -> Attribution:
    if reset.quantity == "entropy_gradient":
        blend.at(alphas)
        blend.make_room()
        return attribute_entropy(model, decoder.groups, batches, comparison.positions, targets.base_of)
    blend.make_room()
    total = sum(group.count for group in decoder.groups)
    top = max(1, count_of(reset.fraction, total)) if reset.budget == "union" else 0
    attribution = attribute(model, decoder, batches, comparison.positions, top)
    check_reconstruction(attribution, next(model.parameters()).dtype)
    return attribution


def _select(
    groups: tuple[NeuronGroup, ...], attribution: Attribution, reset: Reset, seed: int
) -> list[GroupReset]:
    # The random control takes the counts of the quantity's own ranking.
    ranking = reset.rank_by if reset.rank_by in ("absolute", "signed") else attribution.ranking
    scores = attribution.total if ranking == "signed" else attribution.absolute
    wrong = {g.parameter for g, s in zip(groups, scores, strict=True) if not bool(s.isfinite().all())}
    if wrong:
        raise ValueError(
            f"Expected finite contributions of the neurons but those of {listing(wrong)} are NaN or infinite. Do "
            "the model's logits overflow? Run it in float32 or bfloat16, or pass `reset=None` for fusion alone."
        )
    # A weight without an adapter is the base's own: its neurons count, and a reset of them is nothing. Nor is one
    # without a contribution to any position (an expert that no token reached) a candidate.
    chosen = select_neurons(
        [torch.zeros_like(s) if g.fixed else s for g, s in zip(groups, scores, strict=True)],
        [group.layer for group in groups],
        reset.fraction,
        scope=reset.scope,
        union=[u & (not g.fixed) for g, u in zip(groups, attribution.union, strict=True)]
        if reset.budget == "union"
        else None,
        generator=torch.Generator().manual_seed(seed) if reset.rank_by == "random" else None,
    )
    return [
        GroupReset(group, group.place(neurons).sort().values)
        for group, neurons in zip(groups, chosen, strict=True)
    ]
