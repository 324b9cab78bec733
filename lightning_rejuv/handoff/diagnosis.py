"""The result of a diagnosis, as a table and as JSON; and the rule of its verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_rejuv.handoff.checks import Finding
from lightning_rejuv.handoff.report import row
from lightning_rejuv.handoff.statistics import TensorStatistics, pooled
from lightning_rejuv.options import FIXED_ALPHA

if TYPE_CHECKING:
    from lightning_rejuv.handoff.behaviour import Behaviour

OVER_TRAINED, HEALTHY, UNCHANGED, UNKNOWN = "over-trained", "healthy", "unchanged", "unknown"
# Absolute entropies say nothing across bases and prompts; the ratio to the base on the same tokens does.
# arXiv 2606.18487 flags models that lose more than half of it.
ENTROPY_RATIO = 0.5
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_SHOWN = 12


@dataclass(frozen=True)
class Diagnosis:
    """An SFT checkpoint beside its base. ``print(diagnosis)`` is a table.

    Attributes:
        base: the base's directory.
        sft: the SFT model's.
        tensors: drift of every tensor, by name on disk, and what rounding takes from its fusion at alpha 0.5.
        findings: tying, vocabulary, tokenizer, chat template, EOS, generation config.
        behaviour: entropies and support; None without calibration data.
        verdict: "over-trained", "healthy", "unchanged" or, from weights alone, "unknown".
        reason: of the verdict.
        alpha: the recommended weight of the SFT model.
    """

    base: str
    sft: str
    tensors: Mapping[str, TensorStatistics]
    findings: tuple[Finding, ...]
    behaviour: Behaviour | None
    verdict: str
    reason: str
    alpha: float

    @property
    def total(self) -> TensorStatistics:
        """All tensors as one vector."""
        return pooled(self.tensors.values())

    @property
    def layers(self) -> dict[str, TensorStatistics]:
        """By layer, the rest by name."""
        groups: dict[str, list[TensorStatistics]] = {}
        for name, statistics in self.tensors.items():
            found = _LAYER.search(name)
            groups.setdefault(f"layer {found.group(1)}" if found else name, []).append(statistics)
        return {name: pooled(group) for name, group in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers that JSON has."""
        b = self.behaviour
        return {
            "base": self.base,
            "sft": self.sft,
            "verdict": self.verdict,
            "reason": self.reason,
            "alpha": self.alpha,
            "total": row(self.total),
            "layers": {name: row(statistics) for name, statistics in self.layers.items()},
            "tensors": {name: row(statistics) for name, statistics in self.tensors.items()},
            "findings": [vars(finding) for finding in self.findings],
            "behaviour": {**asdict(b), "entropy_ratio": b.entropy_ratio} if b else None,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        total = self.total
        yield f"{self.sft} beside {self.base}: {self.verdict}"
        yield f"  {self.reason}"
        yield f"  recommended alpha  {self.alpha:.2f}"
        if self.behaviour:
            b = self.behaviour
            whose = "right answers of the base" if b.verified else "responses that the base samples"
            entropies = (
                f"{b.entropy_sft:.3f} nats, the base's {b.entropy_base:.3f}, ratio {b.entropy_ratio:.2f}"
            )
            yield f"  token entropy      {entropies} ({b.responses} responses, teacher-forced)"
            yield f"  support retention  {b.support_retention:+.2f} nats per response, on {whose}"
        yield f"  drift              {total.drift:.4f}  (‖sft - base‖ / ‖base‖, {total.count:,} weights)"
        yield f"  changed by SFT     {total.changed_share:.1%} of the weights"
        yield f"  rounding loss      {total.rounding_loss:.1%} of those stay at an end point when fused at alpha 0.5"
        yield "  drift by layer     drift   changed  rounding loss"
        ranked = sorted(self.layers.items(), key=lambda item: -item[1].drift)
        for name, s in ranked[:_SHOWN]:
            yield f"    {name[-40:]:<15} {s.drift:>9.4f} {s.changed_share:>9.1%} {s.rounding_loss:>14.1%}"
        if len(ranked) > _SHOWN:
            yield f"    … {len(ranked) - _SHOWN} more with less drift (all in `--json`)"
        yield from map(str, self.findings)


def judge(tensors: Mapping[str, TensorStatistics], behaviour: Behaviour | None) -> tuple[str, float, str]:
    """Return the verdict, the recommended alpha and the reason.

    Over-trained is a model that finds what its base samples less likely than the rule of ``alpha="auto"``
    allows, or that has lost more than half of the base's token entropy. Weights alone tell how far a model
    has gone, not whether that was too far.
    """
    if not any(statistics.difference for statistics in tensors.values()):
        return UNCHANGED, 1.0, "No weight differs from the base: there is nothing to rejuvenate."
    if behaviour is None:
        return (
            UNKNOWN,
            FIXED_ALPHA,
            "Weights alone cannot tell whether SFT went too far, nor which alpha fits: pass calibration data.",
        )
    lost = behaviour.search.alpha < 1.0
    sharp = behaviour.entropy_ratio < ENTROPY_RATIO
    if not lost and not sharp:
        return HEALTHY, 1.0, "The base's support and entropy are kept: start RL from the SFT model itself."
    reasons = []
    if lost:
        reasons.append(
            f"what the base samples is {-behaviour.support_retention:.2f} nats per response less likely "
            f"({behaviour.search.target:.2f} are allowed)"
        )
    if sharp:
        ratio = behaviour.entropy_ratio
        reasons.append(f"token entropy is {ratio:.0%} of the base's (below {ENTROPY_RATIO:.0%})")
    alpha = behaviour.search.alpha if lost else FIXED_ALPHA
    return OVER_TRAINED, alpha if math.isfinite(alpha) else FIXED_ALPHA, "; ".join(reasons).capitalize() + "."
