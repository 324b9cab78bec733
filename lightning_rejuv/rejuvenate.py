"""The method on one page: check, find alpha, attribute, select, fuse, reset, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.alpha import AlphaSearch, search_alpha
from lightning_rejuv.anchor import Anchor, AnchorSource, match
from lightning_rejuv.attribution import (
    Calibrated,
    PositionRule,
    RankBy,
    Scope,
    calibrate,
    confidence,
    mean_entropy,
    nll_per_response,
    select_neurons,
)
from lightning_rejuv.calibration import Batch, as_batches
from lightning_rejuv.drift import Drift, check_finite, measure_drift, pooled
from lightning_rejuv.edit import Blend, lerp_
from lightning_rejuv.forward import device_of, evaluation_mode
from lightning_rejuv.neurons import NeuronGroup, take_apart
from lightning_rejuv.options import Alpha, Options
from lightning_rejuv.report import AttributionReport, RejuvenationReport, TensorReport

Sampler = Callable[[nn.Module], Iterable[Any]]


def rejuvenate(
    model: nn.Module,
    anchor: AnchorSource,
    calibration: Iterable[Any] | None = None,
    *,
    alpha: Alpha = 0.5,
    reset_fraction: float = 0.01,
    omega: float = 1.0,
    positions: PositionRule = "sharpened",
    positions_per_response: int = 1,
    rank_by: RankBy = "absolute",
    scope: Scope = "model",
    sampler: Sampler | None = None,
    target_excess: float = 1.0,
    seed: int = 0,
) -> RejuvenationReport:
    """Restore the plasticity of an over-trained language model, in place, between SFT and RL.

    *Base-anchored fusion* replaces every parameter by ``alpha * sft + (1 - alpha) * base``. Then the
    *attribution-targeted reset* returns the neurons that push hardest on over-confident tokens to the
    base: ``omega * base + (1 - omega) * fused`` (Liu et al. 2026, arXiv 2606.09932, §3). Everything is
    checked and computed before the first weight changes; modes, ``requires_grad``, gradients, hooks and
    random states are left as they were.

    Args:
        model: the SFT model. Fusion works on any module, the reset on the decoders that
            :mod:`lightning_rejuv.neurons` knows.
        anchor: the base, as :meth:`Anchor.open` takes it; it is not changed.
        calibration: batches with ``input_ids`` [B, T], ``labels`` [B, T] (-100 outside the response)
            and perhaps ``attention_mask``; not needed with ``reset_fraction=0``.
        alpha: weight of the SFT model, 0 to 1; 1 is reset alone. ``"auto"`` takes the largest alpha at
            which the fused model's excess negative log-likelihood on the base's own sampled responses
            is ``target_excess``.
        reset_fraction: share of all neurons that is reset, 0 to 1; 0 is fusion alone.
        omega: weight of the base on a reset neuron; 1 overwrites it.
        positions: ``"sharpened"``, where the base already gave the target p >= 0.25, so that new skills
            are not un-taught; or ``"entropy_gap"``, the paper's rule.
        positions_per_response: at how many positions of a response, at most, neurons are attributed.
        rank_by: ``"absolute"`` or ``"signed"`` mean contribution; ``"random"`` is the control, the same
            count per matrix drawn at random.
        scope: what neurons compete in: the ``"model"``, each ``"layer"`` or each ``"module"``.
        sampler: for ``alpha="auto"``: called with the model while it holds the anchor's weights;
            returns responses that it sampled, as batches in the form of ``calibration``.
        target_excess: for ``alpha="auto"``, nats per response.
        seed: of the random control.

    Returns:
        A report of what was done; ``print`` it.

    Raises:
        ValueError: an argument out of range, a calibration set that is empty or has empty responses, an
            anchor that does not match or equals the model, NaN or infinity in either, a family that the
            neuron map does not know. Nothing has been changed then.
        FileNotFoundError: the anchor's path does not exist.

    Example: fusion alone, on any module.

        >>> base, sft = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(base.weight), nn.init.ones_(sft.weight)
        >>> report = rejuvenate(sft, base, alpha=0.25, reset_fraction=0)
        >>> sft.weight.tolist()
        [[0.25, 0.25]]
    """
    started = time.perf_counter()
    options = Options(
        alpha, reset_fraction, omega, positions, positions_per_response, rank_by, scope, target_excess, seed
    )
    if alpha == "auto" and sampler is None:
        raise ValueError(
            'Expected a `sampler` for `alpha="auto"`: a function that takes the model (which then holds the '
            "anchor's weights) and returns sampled responses as batches with `input_ids` and `labels`."
        )
    source = Anchor.open(anchor)
    names = match(model, source)

    def base_of(name: str) -> Tensor:
        return source.tensor(names[name])

    before = measure_drift(model, base_of)
    check_finite(before, model, base_of, source.description)
    device = device_of(model)
    decoder = take_apart(model) if reset_fraction > 0 else None
    batches = [b.to(device) for b in as_batches(calibration)] if decoder else []

    search: AlphaSearch | None = None
    calibrated: Calibrated | None = None
    if decoder or alpha == "auto":
        with evaluation_mode(model), Blend(model, base_of) as blend:
            if alpha == "auto":
                assert sampler is not None
                search = _find_alpha(model, blend, sampler, target_excess)
            if decoder:
                calibrated = calibrate(model, decoder, blend, batches, positions, positions_per_response)
    weight = search.alpha if search else float(alpha)
    groups = decoder.groups if decoder else ()
    selected = _select(groups, calibrated, options)

    for name, parameter in model.named_parameters():
        lerp_(parameter, base_of(name), 1.0 - weight)
    for group, index in zip(groups, selected, strict=True):
        reset_neurons(model, group, index, base_of, omega)

    after = measure_drift(model, base_of)
    return RejuvenationReport(
        anchor=source.description,
        alpha=weight,
        omega=omega,
        reset_fraction=reset_fraction,
        rank_by=rank_by,
        drift_before=pooled(before),
        drift_after=pooled(after),
        tensors=_tensor_reports(before, after, groups, selected),
        attribution=_attribution_report(model, calibrated, batches, positions),
        search=search,
        seconds=time.perf_counter() - started,
    )


def reset_neurons(
    model: nn.Module, group: NeuronGroup, index: Tensor, base_of: Callable[[str], Tensor], omega: float = 1.0
) -> None:
    """Return neurons of one group to the base: their rows or columns, and their entries of the bias."""
    lerp_(model.get_parameter(group.parameter), base_of(group.parameter), omega, dim=group.dim, index=index)
    if group.bias is not None:
        lerp_(model.get_parameter(group.bias), base_of(group.bias), omega, index=index)


def _find_alpha(model: nn.Module, blend: Blend, sampler: Sampler, target: float) -> AlphaSearch:
    """Search alpha on responses that the anchor samples itself."""
    blend.at(0.0)
    own = [b.to(device_of(model)) for b in as_batches(sampler(model), what="sampled")]

    def nll(alpha: float) -> float:
        blend.at(alpha)
        return nll_per_response([confidence(model, batch) for batch in own])

    floor = nll(0.0)
    return search_alpha(lambda alpha: nll(alpha) - floor, target)


def _select(groups: tuple[NeuronGroup, ...], calibrated: Calibrated | None, options: Options) -> list[Tensor]:
    if calibrated is None:
        return []
    attribution = calibrated.attribution
    scores = attribution.total if options.rank_by == "signed" else attribution.absolute
    return select_neurons(
        scores,
        [group.layer for group in groups],
        options.reset_fraction,
        scope=options.scope,
        generator=torch.Generator().manual_seed(options.seed) if options.rank_by == "random" else None,
    )


def _tensor_reports(
    before: dict[str, Drift], after: dict[str, Drift], groups: tuple[NeuronGroup, ...], selected: list[Tensor]
) -> list[TensorReport]:
    reset = {g.parameter: (g, len(index)) for g, index in zip(groups, selected, strict=True)}
    reports = []
    for name in before:
        drift = before[name].relative, after[name].relative
        if name in reset:
            group, count = reset[name]
            reports.append(TensorReport(name, *drift, group.count, count, group.layer, group.kind))
        else:
            reports.append(TensorReport(name, *drift))
    return reports


def _attribution_report(
    model: nn.Module, calibrated: Calibrated | None, batches: list[Batch], rule: str
) -> AttributionReport | None:
    if calibrated is None:
        return None
    with evaluation_mode(model):
        entropy_after = mean_entropy([confidence(model, batch) for batch in batches])
    return AttributionReport(
        rule=rule,
        positions=calibrated.attribution.positions,
        sharpened=calibrated.sharpened,
        learned=calibrated.learned,
        reconstruction_error=calibrated.attribution.error,
        entropy_base=calibrated.entropy_base,
        entropy_before=calibrated.entropy_sft,
        entropy_after=entropy_after,
    )
