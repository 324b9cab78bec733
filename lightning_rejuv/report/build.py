"""Putting a report together: what is known before the edit, and what is measured after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_rejuv.config import Options
from lightning_rejuv.make_plan import Findings
from lightning_rejuv.plan import Plan
from lightning_rejuv.report.report import (
    AttributionReport,
    ComparisonReport,
    NeuronReport,
    RejuvenationReport,
    TensorReport,
)
from lightning_rejuv.weights.drift import Drift, pooled
from lightning_rejuv.weights.targets import Targets


def draft_report(plan: Plan, findings: Findings, options: Options, targets: Targets) -> RejuvenationReport:
    """Put together what is known before the edit, so that nothing of it can fail after it.

    Args:
        plan: what is going to be changed.
        findings: what was seen while it was planned.
        options: what was asked for.
        targets: what is changed.

    Returns:
        The report, without what is measured afterwards.
    """
    attribution = None
    if options.reset and (found := findings.attribution):
        attribution = AttributionReport(
            quantity=options.reset.quantity if findings.comparison else "loss",
            rank_by=options.reset.rank_by or found.ranking,
            positions=found.positions,
            reconstruction_error=found.error if found.reconstructs else None,
        )
    comparison = None
    if findings.comparison is not None:
        selected = findings.comparison.positions
        comparison = ComparisonReport(
            rule=options.reset.positions if options.reset and selected else None,
            sharpened=sum(p.sharpened for p in selected) if selected else None,
            learned=sum(p.learned for p in selected) if selected else None,
            entropy_base=findings.comparison.entropy_base,
            entropy_before=findings.comparison.entropy_sft,
            entropy_after=None,
        )
    return RejuvenationReport(
        anchor=targets.description,
        alpha=dict(plan.alpha) if isinstance(plan.alpha, Mapping) else plan.alpha,
        reset=options.reset,
        drift_before=pooled(findings.drift),
        drift_after=None,
        tensors=[TensorReport(name, drift.relative, None) for name, drift in findings.drift.items()],
        neurons=[
            NeuronReport(r.group.parameter, r.group.kind, r.group.layer, r.group.count, len(r.index))
            for r in plan.resets
        ],
        attribution=attribution,
        comparison=comparison,
        search=findings.search,
        refit=findings.refit,
        rounding=options.rounding,
        rounding_shift=None,
        optimizer_state_left=[],
        buffers_fused=list(targets.buffers.fused) if plan.fuses else [],
        buffers_kept=list(targets.buffers.kept) if plan.fuses else [],
        running_statistics=list(targets.buffers.statistics),
        seconds=0.0,
        peak_memory=None,
    )


def finish_report(
    draft: RejuvenationReport,
    targets: Targets,
    *,
    drift: Mapping[str, Drift] | None,
    entropy: float | None,
    rounding: tuple[float, float],
    unsliced: list[str],
    seconds: float,
) -> RejuvenationReport:
    """Add to a report what was measured after the edit.

    Args:
        draft: as :func:`draft_report` made it.
        targets: what was changed.
        drift: from the anchor, by tensor; None if it could not be measured.
        entropy: mean token entropy on the calibration set, nats; None without one.
        rounding: what :func:`lightning_rejuv.weights.edit.rounding_sums` says of all parameters together.
        unsliced: parameters whose optimizer state could not be edited.
        seconds: wall time.
    """
    tensors = draft.tensors
    if drift is not None:
        tensors = [replace(tensor, drift_after=drift[tensor.name].relative) for tensor in tensors]
    return replace(
        draft,
        drift_after=None if drift is None else pooled(drift),
        tensors=tensors,
        comparison=draft.comparison and replace(draft.comparison, entropy_after=entropy),
        rounding_shift=rounding[0] / rounding[1] if rounding[1] else None,
        optimizer_state_left=unsliced,
        seconds=seconds,
        peak_memory=targets.peak_memory(),
    )
