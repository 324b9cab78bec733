"""What a rejuvenation did, in numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_rejuv.alpha import AlphaSearch
from lightning_rejuv.attribution.selection import count_of
from lightning_rejuv.config import Options, Reset, Rounding
from lightning_rejuv.plan import Plan
from lightning_rejuv.refit import RefitReport
from lightning_rejuv.report_layers import by_layer
from lightning_rejuv.report_table import lines, measured
from lightning_rejuv.weights.drift import Drift, pooled
from lightning_rejuv.weights.targets import Targets


@dataclass(frozen=True)
class TensorReport:
    """One parameter.

    Attributes:
        name: its name in the model.
        drift_before: relative L2 distance ‖w - b‖ / ‖b‖ from the anchor before the edit.
        drift_after: the same after it; None where it could not be measured.
    """

    name: str
    drift_before: float
    drift_after: float | None


@dataclass(frozen=True)
class NeuronReport:
    """The neurons of one group.

    Attributes:
        parameter: name of the weight.
        kind: which projection it is.
        layer: its decoder layer.
        count: how many neurons it has.
        reset: how many of them were reset.
    """

    parameter: str
    kind: str
    layer: int
    count: int
    reset: int


@dataclass(frozen=True)
class AttributionReport:
    """How the neurons were chosen.

    Attributes:
        quantity: what they were attributed.
        rank_by: how they were ranked.
        positions: at how many positions (batches, for a loss).
        reconstruction_error: largest relative error of the logits that the contributions add up to; None
            for other quantities, which are no sums.
    """

    quantity: str
    rank_by: str
    positions: int
    reconstruction_error: float | None


@dataclass(frozen=True)
class ComparisonReport:
    """The calibration set before and after.

    Attributes:
        rule: which positions were selected; None, like the next two, without a reset.
        sharpened: how many of them are sharpened: the base already knew the token.
        learned: how many of them are learned: the token is new to the base.
        entropy_base: mean token entropy of the anchor on the calibration responses, nats.
        entropy_before: the same of the model before the edit.
        entropy_after: the same after it; None where it could not be measured.
    """

    rule: str | None
    sharpened: int | None
    learned: int | None
    entropy_base: float
    entropy_before: float
    entropy_after: float | None


@dataclass(frozen=True)
class RejuvenationReport:
    """What :func:`lightning_rejuv.rejuvenate` did. ``print(report)`` is a table.

    Attributes:
        anchor: where the anchor came from.
        alpha: weight of the SFT model in the fusion: one, or one for each name pattern.
        reset: what was asked for; None for fusion alone.
        drift_before: pooled relative L2 distance from the anchor, all parameters, before.
        drift_after: the same after; None where it could not be measured.
        tensors: a report per parameter.
        neurons: a report per neuron group, also of those that hold no adapter; empty for fusion alone.
        attribution: how neurons were chosen; None for fusion alone.
        comparison: the calibration set; None without a language model, and for fusion alone by a number for ``alpha``.
        search: how alpha was found; None where it was given.
        refit: the training steps after the edit; None without them.
        rounding: how parameters of half types were rounded, ``"stochastic"`` or ``"nearest"``.
        rounding_shift: by how much rounding the fusion to half types shifted alpha: how far the rounded weights lie
            from the exact fusion along the line between model and anchor, in parts of that line, positive toward the
            model; of large parameters by every eighth row. None where nothing of a half type was fused. See
            :func:`lightning_rejuv.weights.edit.rounding_sums`.
        optimizer_state_left: parameters whose optimizer state does not have their shape and was not edited.
        buffers_fused: floating buffers that were fused like the parameters.
        buffers_kept: floating buffers that stay the model's, since the anchor does not hold them.
        running_statistics: layers with running statistics of their input (BatchNorm): those of edited weights are
            others, and can be computed anew (``torch.optim.swa_utils.update_bn``).
        seconds: wall time.
        peak_memory: most memory that the process has held so far, on the model's device, bytes.
    """

    anchor: str
    alpha: float | dict[str, float]
    reset: Reset | None
    drift_before: float
    drift_after: float | None
    tensors: list[TensorReport]
    neurons: list[NeuronReport]
    attribution: AttributionReport | None
    comparison: ComparisonReport | None
    search: AlphaSearch | None
    refit: RefitReport | None
    rounding: Rounding
    rounding_shift: float | None
    optimizer_state_left: list[str]
    buffers_fused: list[str]
    buffers_kept: list[str]
    running_statistics: list[str]
    seconds: float
    peak_memory: int | None

    @property
    def neurons_total(self) -> int:
        """Number of neurons that the neuron map knows in the model; 0 for fusion alone."""
        return sum(group.count for group in self.neurons)

    @property
    def neurons_reset(self) -> int:
        """Number of neurons that were reset."""
        return sum(group.reset for group in self.neurons)

    @property
    def neurons_by_layer(self) -> dict[int, dict[str, int]]:
        """Number of neurons that were reset, by layer and projection, for all that there are."""
        return by_layer((group.layer, group.kind, group.reset) for group in self.neurons)

    @property
    def neurons_asked(self) -> int | None:
        """Number of neurons that the reset's ``fraction`` asked for; None for fusion alone and for the paper's union.

        Fewer are reset where fewer have a positive score: with ``"entropy_gradient"``, where the reset of the others
        would not raise the entropy.
        """
        if self.reset is None or self.reset.budget == "union":
            return None
        return count_of(self.reset.fraction, self.neurons_total)

    def summary(self) -> str:
        """One line: what changed and how much."""
        text = f"alpha {self._alpha()}, drift {self.drift_before:#.3g} -> {measured(self.drift_after)}"
        if self.attribution:
            text += f", {self.neurons_reset} of {self.neurons_total} neurons reset"
            if self.neurons_asked not in (None, self.neurons_reset):
                text += f" ({self.neurons_asked} asked for)"
        if self.refit:
            text += f", {self.refit.steps} steps of refit"
        if self.comparison:
            c = self.comparison
            text += f", token entropy {c.entropy_before:.3f} -> {measured(c.entropy_after, '.3f')} nats"
            text += f" (anchor {c.entropy_base:.3f})"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers that JSON has; what is not finite is None."""
        counts = ("neurons_total", "neurons_reset", "neurons_asked")
        plain: dict[str, Any] = _plain({**asdict(self), **{name: getattr(self, name) for name in counts}})
        return plain

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON; the file appears whole or not at all."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.unlink(missing_ok=True)  # of a run that was killed; a link itself, not what it leads to
        try:
            with part.open("x") as file:
                file.write(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)  # of a full disk, or where the name is a directory's

    def __str__(self) -> str:
        return "\n".join(lines(self))

    def _alpha(self) -> str:
        if isinstance(self.alpha, dict):
            return ", ".join(f"{pattern}: {value:g}" for pattern, value in self.alpha.items())
        return f"{self.alpha:.3f}"


def draft_report(plan: Plan, options: Options, targets: Targets) -> RejuvenationReport:
    """Put together what is known before the edit, so that nothing of it can fail after it.

    Args:
        plan: what is going to be changed.
        options: what was asked for.
        targets: what is changed.

    Returns:
        The report, without what is measured afterwards.
    """
    attribution = None
    if options.reset and (found := plan.attribution):
        attribution = AttributionReport(
            quantity=options.reset.quantity if plan.comparison else "loss",
            rank_by=options.reset.rank_by or found.ranking,
            positions=found.positions,
            reconstruction_error=found.error if found.reconstructs else None,
        )
    comparison = None
    if plan.comparison is not None:
        selected = plan.comparison.positions
        comparison = ComparisonReport(
            rule=options.reset.positions if options.reset and selected else None,
            sharpened=sum(p.sharpened for p in selected) if selected else None,
            learned=sum(p.learned for p in selected) if selected else None,
            entropy_base=plan.comparison.entropy_base,
            entropy_before=plan.comparison.entropy_sft,
            entropy_after=None,
        )
    return RejuvenationReport(
        anchor=targets.description,
        alpha=dict(plan.alpha) if isinstance(plan.alpha, Mapping) else plan.alpha,
        reset=options.reset,
        drift_before=pooled(plan.drift),
        drift_after=None,
        tensors=[TensorReport(name, drift.relative, None) for name, drift in plan.drift.items()],
        neurons=[
            NeuronReport(r.group.parameter, r.group.kind, r.group.layer, r.group.count, len(r.index))
            for r in plan.resets
        ],
        attribution=attribution,
        comparison=comparison,
        search=plan.search,
        refit=plan.refitted.report if plan.refitted else None,
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
        drift: from the anchor, by tensor; None where it could not be measured.
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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
