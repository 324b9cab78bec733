"""What a rejuvenation did, in numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rejuv.config import Reset, Rounding
from lightning_rejuv.report.layers import by_layer, places_of, table
from lightning_rejuv.report.rows import measured, refit_rows, rounding, row, search_rows

if TYPE_CHECKING:
    from lightning_rejuv.alpha.search import AlphaSearch
    from lightning_rejuv.refit import RefitReport

_TENSORS = 4  # that have moved furthest


@dataclass(frozen=True)
class TensorReport:
    """One parameter.

    Attributes:
        name: its name in the model.
        drift_before: relative L2 distance ‖w - b‖ / ‖b‖ from the anchor before the edit.
        drift_after: the same after it; None if it could not be measured.
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
        entropy_after: the same after it; None if it could not be measured.
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
        drift_after: the same after; None if it could not be measured.
        tensors: a report per parameter.
        neurons: a report per neuron group, also of those that hold no adapter; empty for fusion alone.
        attribution: how neurons were chosen; None for fusion alone.
        comparison: the calibration set; None without a language model, and for fusion alone by a number for ``alpha``.
        search: how alpha was found; None if it was given.
        refit: the training steps after the edit; None without them.
        rounding: how parameters of half types were rounded, ``"stochastic"`` or ``"nearest"``.
        rounding_shift: by how much rounding the fusion to half types shifted alpha: how far the rounded weights lie
            from the exact fusion along the line between model and anchor, in parts of that line, positive toward the
            model; for large parameters every eighth row is measured. None if nothing of a half type was fused. See
            :func:`lightning_rejuv.weights.edit.rounding_sums`.
        optimizer_state_left: parameters whose optimizer state does not have their shape and was not edited.
        buffers_fused: floating buffers that were fused like the parameters.
        buffers_kept: floating buffers that stay the model's, since the anchor does not hold them.
        running_statistics: layers with running statistics of their input (BatchNorm): edited weights have
            other statistics, which can be computed anew (``torch.optim.swa_utils.update_bn``).
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

        Fewer are reset if fewer have a positive score: with ``"entropy_gradient"``, if the reset of the others
        would not raise the entropy.
        """
        if self.reset is None or self.reset.budget == "union":
            return None
        from lightning_rejuv.attribution.selection import (
            count_of,
        )  # not to import all that a fusion does not need

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
            part.unlink(missing_ok=True)  # of a full disk, or if the name is a directory's

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def _alpha(self) -> str:
        if isinstance(self.alpha, dict):
            return ", ".join(f"{pattern}: {value:g}" for pattern, value in self.alpha.items())
        return f"{self.alpha:.3f}"


def _lines(report: RejuvenationReport) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"Rejuvenation toward {report.anchor}"
    yield from _alpha(report)
    yield row(
        "drift",
        f"{report.drift_before:#.3g} -> {measured(report.drift_after)}  (‖w - b‖ / ‖b‖, all parameters)",
    )
    furthest = sorted(report.tensors, key=lambda tensor: -tensor.drift_before)[:_TENSORS]
    for number, tensor in enumerate(furthest):
        drift = f"{tensor.drift_before:#.3g} -> {measured(tensor.drift_after)}"
        yield row("  furthest" if number == 0 else "", f"{drift}  {tensor.name}")
    if report.comparison:
        c = report.comparison
        after = measured(c.entropy_after, ".4f")
        entropy = f"{c.entropy_before:.4f} -> {after} nats  (anchor {c.entropy_base:.4f})"
        yield row("token entropy", f"{entropy}, teacher-forced on the calibration responses")
    if report.attribution:
        yield from _neurons(report)
    if report.refit:
        for title, text in refit_rows(report.refit, report.search is None):
            yield row(title, text)
    if report.rounding_shift is not None:
        remedy = "a float32 model" + (' or `rounding="stochastic"`' if report.rounding == "nearest" else "")
        yield row("rounding", rounding(report.rounding_shift, remedy))
    if report.optimizer_state_left:
        count = len(report.optimizer_state_left)
        yield row(
            "optimizer",
            f"the state of {count} parameters could not be edited, e.g. of {report.optimizer_state_left[0]}",
        )
    yield from _buffers(report)
    memory = (
        ""
        if report.peak_memory is None
        else f", peak memory of the process {report.peak_memory / 2**20:.0f} MiB"
    )
    yield row("cost", f"{report.seconds:.2f} s{memory}")


def _alpha(report: RejuvenationReport) -> Iterator[str]:
    if isinstance(report.alpha, dict):
        for number, (pattern, value) in enumerate(report.alpha.items()):
            yield row("" if number else "alpha", f"{value:.3f}  {pattern}")
        return
    yield row("alpha", f"{report.alpha:.3f}  (weight of the SFT model)")
    if report.search:
        for title, text in search_rows(report.search):
            yield row(title, text)


def _buffers(report: RejuvenationReport) -> Iterator[str]:
    fused, kept, statistics = report.buffers_fused, report.buffers_kept, report.running_statistics
    if fused or kept:
        text = f"{len(fused)} fused like the parameters"
        if kept:
            text += f", {len(kept)} left, since the anchor does not hold them, e.g. {kept[0]}"
        yield row("buffers", text)
    if statistics and (kept or report.drift_after != 0):
        text = f"of {len(statistics)} layers, e.g. {statistics[0]!r}, do not fit the edited weights exactly"
        yield row("statistics", f"{text}: recompute them (torch.optim.swa_utils.update_bn)")


def _asked(report: RejuvenationReport) -> Iterator[str]:
    """Say why fewer neurons were reset than were asked for."""
    asked = report.neurons_asked
    if asked is None or (asked and asked == report.neurons_reset):
        return
    assert report.reset is not None
    assert report.attribution is not None
    text = f"{asked} ({report.reset.fraction:.2%})"
    if not asked:
        yield row("  asked for", f"{text}, which is less than half a neuron")
        return
    why = "; the score of the others is not positive"
    if report.attribution.quantity == "entropy_gradient":
        why += ": their reset would not raise the entropy"
    yield row("  asked for", text + why)


def _neurons(report: RejuvenationReport) -> Iterator[str]:
    found = report.attribution
    assert found is not None
    assert report.reset is not None
    total = max(1, report.neurons_total)
    count = f"{report.neurons_reset} of {report.neurons_total} ({report.neurons_reset / total:.2%})"
    yield row(
        "neurons reset", f"{count}, ranked {found.rank_by} by {found.quantity}, omega {report.reset.omega:g}"
    )
    yield from _asked(report)
    if report.comparison:
        c = report.comparison
        split = f"{c.sharpened} sharpened, {c.learned} learned"
        yield row("positions", f"{found.positions} ({c.rule}): {split}")
    if found.reconstruction_error is not None:
        yield row("reconstruction", f"error {found.reconstruction_error:.1e} of the target logits, at most")
    if report.neurons_reset:
        yield row("reset in", places_of(report.neurons_by_layer))
        for title, text in table(report.neurons_by_layer):
            yield row(f"  {title}", text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
