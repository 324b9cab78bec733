"""The result of a diagnosis, as a table and as JSON, and the recommendation that follows from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_rejuv.alpha.doubts import doubt_seen, doubt_swapped
from lightning_rejuv.alpha.search import USUAL_ALPHA
from lightning_rejuv.checkpoints.checks import Finding
from lightning_rejuv.checkpoints.record import Record
from lightning_rejuv.checkpoints.report import row
from lightning_rejuv.checkpoints.stream import TensorStatistics, pooled
from lightning_rejuv.report.layers import bands
from lightning_rejuv.report.rows import rounding, search_rows
from lightning_rejuv.verdict import Reason, Verdict, judge

if TYPE_CHECKING:
    from lightning_rejuv.checkpoints.behaviour import Behaviour

UNMEASURED = "Weights alone cannot tell whether SFT went too far."
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_TITLE, _OTHERS = "layer ", 4


@dataclass(frozen=True)
class Diagnosis:
    """An SFT checkpoint beside its base. ``print(diagnosis)`` is a table.

    Attributes:
        base: the base's directory.
        sft: the SFT model's.
        tensors: drift of every tensor, by name on disk, and by how much rounding shifts alpha 0.4.
        findings: tying, vocabulary, tokenizer, chat template, EOS, generation config, an earlier rejuvenation,
            and what was warned of while models ran.
        behaviour: entropies, support, rollouts and the search for alpha; None without calibration data.
        verdict: the monitor's level: "healthy", "at risk", "over-confident", "cannot start", or "unknown", as it is
            without calibration data.
        reasons: the measures that were judged, the one that decided first.
        recommendation: what to do, in a sentence.
        alpha: the recommended weight of the SFT model, which is never another than the search found; None
            if nothing is recommended.
        rejuvenated: how the SFT model was rejuvenated before; None if it was not.
        device: the device that models were run on; None without calibration data.
        compute_dtype: the dtype that they were run in; None without calibration data.
    """

    base: str
    sft: str
    tensors: Mapping[str, TensorStatistics]
    findings: tuple[Finding, ...]
    behaviour: Behaviour | None
    verdict: str
    reasons: tuple[Reason, ...]
    recommendation: str
    alpha: float | None
    rejuvenated: Record | None = None
    device: str | None = None
    compute_dtype: str | None = None

    @property
    def reason(self) -> str:
        """The reasons of the verdict, in one line."""
        return "; ".join(reason.text for reason in self.reasons) if self.reasons else UNMEASURED

    @property
    def total(self) -> TensorStatistics:
        """All tensors as one vector."""
        return pooled(self.tensors.values())

    @property
    def layers(self) -> dict[str, TensorStatistics]:
        """The tensors of each layer as one vector, and the other tensors by name."""
        groups: dict[str, list[TensorStatistics]] = {}
        for name, statistics in self.tensors.items():
            found = _LAYER.search(name)
            groups.setdefault(f"{_TITLE}{found.group(1)}" if found else name, []).append(statistics)
        return {name: pooled(group) for name, group in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers that JSON has; what is not finite is null."""
        b = self.behaviour
        return {
            "base": self.base,
            "sft": self.sft,
            "verdict": self.verdict,
            "reason": self.reason,
            "reasons": [reason._asdict() for reason in self.reasons],
            "recommendation": self.recommendation,
            "alpha": self.alpha,
            "rejuvenated": self.rejuvenated.to_dict() if self.rejuvenated else None,
            "total": row(self.total),
            "layers": {name: row(statistics) for name, statistics in self.layers.items()},
            "tensors": {name: row(statistics) for name, statistics in self.tensors.items()},
            "findings": [vars(finding) for finding in self.findings],
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "behaviour": _finite({**asdict(b), "entropy_ratio": b.entropy_ratio, "doubts": b.doubts})
            if b
            else None,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        total = self.total
        yield f"{self.sft} beside {self.base}: {self.verdict}"
        if self.reasons:
            yield from (f"  - {reason.text} [{reason.level}]" for reason in self.reasons)
        else:
            yield f"  {UNMEASURED}"
        yield f"  {self.recommendation}"
        if self.behaviour:
            b = self.behaviour
            entropies = (
                f"{b.entropy_sft:.3f} nats, the base's {b.entropy_base:.3f}, ratio {b.entropy_ratio:.2f}"
            )
            yield f"  token entropy      {entropies} ({b.responses} responses, teacher-forced)"
            yield (
                f"  support retention  {b.support_retention:+.2f} nats per response, on responses that the base samples"
            )
            if b.rollouts:
                r = b.rollouts
                unfinished = f", {r.unfinished} of the rollouts unfinished" if r.unfinished else ""
                yield (
                    f"  rollouts           {r.prompts} prompts x {r.group}: pass@1 {r.pass_at_1:.2f}, "
                    f"pass@8 {r.pass_at_8:.2f}, {r.zero_variance_fraction:.0%} of the groups all right or all wrong"
                    f"{unfinished}"
                )
            found = f"{b.search.alpha:.3f}  (weight of the SFT model)" if b.search else "none"
            yield f"  alpha found        {found}"
            rows = list(search_rows(b.search)) if b.search else []
            shown = [text for _, text in rows]
            rows += [("  doubt", doubt) for doubt in b.doubts if doubt not in shown]
            for title, text in rows:
                if text not in self.recommendation:  # a recommendation to rejuvenate ends with the doubts
                    yield f"  {title:<19}{text}"
        if self.compute_dtype:
            yield f"  models ran         on {self.device} in {self.compute_dtype}"
        yield f"  drift              {total.drift:#.3g}  (‖sft - base‖ / ‖base‖, {total.count:,} weights)"
        yield f"  changed by SFT     {total.changed_share:.1%} of the weights"
        told = rounding(total.rounding_shift, "`--rounding stochastic`, the default,")
        yield f"  rounding           fused at alpha {USUAL_ALPHA:g} and rounded to nearest, {told}"
        yield "  by layer               drift   changed"
        for name, s in self._by_layer():
            yield f"    {name[-40:]:<15} {s.drift:>#9.3g} {s.changed_share:>9.1%}"
        yield from map(str, self.findings)

    def _by_layer(self) -> Iterator[tuple[str, TensorStatistics]]:
        """Yield the layers, neighbours together if they are many, and the other tensors that have moved furthest."""
        known = self.layers
        numbers = [int(name.removeprefix(_TITLE)) for name in known if name.startswith(_TITLE)]
        for title, band in bands(numbers):
            yield (
                f"layers {title}" if len(band) > 1 else f"layer {title}",
                pooled(known[f"{_TITLE}{number}"] for number in band),
            )
        others = [item for item in known.items() if not item[0].startswith(_TITLE)]
        yield from sorted(others, key=lambda item: -item[1].drift)[:_OTHERS]


def verdict_on(behaviour: Behaviour | None) -> Verdict:
    """Ask for the monitor's verdict on what was measured; "unknown" without calibration data."""
    if behaviour is None:
        return judge({})
    return judge(behaviour.measures, {"token_entropy": behaviour.entropy_base})


def recommend(
    verdict: Verdict, behaviour: Behaviour | None, record: Record | None, unchanged: bool
) -> tuple[str, float | None]:
    """Say what to do, and with which alpha: the one that the search found, or none.

    Args:
        verdict: :func:`verdict_on` the model.
        behaviour: what the calibration data said.
        record: how it was rejuvenated before.
        unchanged: whether it has the base's weights.
    """
    if record is not None:
        return _of_rejuvenated(verdict, record), None
    if unchanged:
        more = f" {verdict.advice}" if verdict.level == "cannot start" else ""
        return f"No weight differs from the base: there is nothing to rejuvenate.{more}", None
    if behaviour is None:
        return "Nothing is recommended without calibration data: measure with `--calibration`.", None
    search = behaviour.search
    if verdict.level == "healthy":
        whole = search is not None and search.alpha == 1.0
        entropy = behaviour.entropy_base, behaviour.entropy_sft
        told = doubt_seen(behaviour.nll_sft, entropy)
        if behaviour.no_alpha is not None:
            told = (behaviour.no_alpha, *told)
        if search is not None:
            nll = search.curve[0].demonstrations, search.curve[-1].demonstrations
            told = (*doubt_swapped(nll, entropy), *told)
        return " ".join((verdict.advice, *told)), 1.0 if whole else None
    if verdict.level == "cannot start":
        diverged = verdict.deciding and verdict.deciding.advice
        return verdict.advice + " Fusion with the base would not bring it." * (not diverged), None
    if verdict.level == "unknown":
        return f"{verdict.advice} `--verifier` has them sampled and judged.", None
    doubts = " ".join(("", *behaviour.doubts))
    if search is None or search.found_nothing_right:
        return f"No alpha is recommended: take an earlier checkpoint.{doubts}", None
    found = search.alpha
    if found == 1.0:
        return (
            f"There is nothing to fuse: the search found alpha 1. Take an earlier checkpoint.{doubts}",
            found,
        )
    first = "Compare more rollouts, or rejuvenate" if verdict.level == "at risk" else "Rejuvenate"
    if (before := search.raised_from) is not None:
        why = f"`--alpha auto`, which checks no rollouts, would take {before:g}"
        return f"{first} with `--alpha {found:g}`: {why}.{doubts}", found
    return f"{first} with alpha {found:.3f}, which the search found (`--alpha auto`).{doubts}", found


def _of_rejuvenated(verdict: Verdict, record: Record) -> str:
    already, again = (
        "It is rejuvenated already",
        "rejuvenate the SFT model that it was made from with a {} alpha",
    )
    alphas = record.alpha.values() if isinstance(record.alpha, dict) else [record.alpha]
    larger = again.format("larger") if any(alpha < 1 for alpha in alphas) else "do more SFT"
    smaller = again.format("smaller") if any(alpha > 0 for alpha in alphas) else "take another base"
    if verdict.level == "unknown" or (verdict.deciding and verdict.deciding.advice):
        return f"{already}: do not rejuvenate it a second time. {verdict.advice}"
    if verdict.level == "cannot start":
        return f"{already}, and RL would have nothing to reward: {larger}."
    if verdict.level == "over-confident":
        return f"{already}, and over-confident still: {smaller}, or an earlier checkpoint of its SFT."
    start = f"{already}: start RL from it; do not rejuvenate it a second time."
    return f"{start} If RL from it does not improve, {smaller}." if verdict.level == "at risk" else start


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
