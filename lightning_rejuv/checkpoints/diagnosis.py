"""A diagnosis: how far SFT has gone, whether it went too far, and which alpha fits; as a table and as JSON."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rejuv.checkpoints.adapter import is_adapter
from lightning_rejuv.checkpoints.checks import Finding, check_beside_base, check_ends
from lightning_rejuv.checkpoints.options import WITHOUT_CALIBRATION, Running, check_device, refuse_idle
from lightning_rejuv.checkpoints.pairing import open_both, pair_up
from lightning_rejuv.checkpoints.recommendation import recommend, verdict_on
from lightning_rejuv.checkpoints.record import Record, find_record
from lightning_rejuv.checkpoints.report import row
from lightning_rejuv.checkpoints.stream import DTYPES, Edit, FusionStream, TensorStatistics, pooled
from lightning_rejuv.config import USUAL_ALPHA, PathLike
from lightning_rejuv.progress import Listener, reporting
from lightning_rejuv.report.layers import bands
from lightning_rejuv.report.rows import rounding, search_rows
from lightning_rejuv.verdict import Reason
from lightning_rejuv.verifier import check_verifier, import_verifier
from lightning_rejuv.warned import collecting_warnings

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
        """Return everything as plain lists, dicts, strings and numbers that JSON has; what is not finite is null."""
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


def diagnose_checkpoint(
    base: PathLike,
    sft: PathLike,
    running: Running,
    verifier: str | Callable[[str, str], object] | None,
    progress: Listener | None,
) -> Diagnosis:
    """Do what :func:`lightning_rejuv.checkpoints.diagnose` says.

    Args:
        base: directory of the checkpoint that SFT started from.
        sft: directory of the SFT model.
        running: how models are run, if they are.
        verifier: a function of prompt and response, or ``"module:function"``.
        progress: called with phases.
    """
    check = None
    if running.calibration is None:
        if verifier is not None:
            raise ValueError("Expected `calibration` with `verifier`: its prompts are what is answered.")
        refuse_idle(running.given, *WITHOUT_CALIBRATION)
    else:
        check_device(running.device)
        check = _verifier(verifier)
    if is_adapter(sft):
        raise ValueError(
            f"{str(sft)!r} is an adapter: merge it first (`merge_adapter(base, sft, out, alpha=1)`) and diagnose the "
            "merged model."
        )
    *opened, warnings = open_both(sft, base)
    pairing = pair_up(*opened)
    own, anchor = pairing.sft, pairing.base
    read = None
    if running.calibration is not None:
        from lightning_rejuv.checkpoints.behaviour import measure_behaviour
        from lightning_rejuv.checkpoints.plan_on_disk import calibration_for

        # Before the weights, which take minutes to read: what is refused is refused at once.
        read = calibration_for(own, Path(running.calibration).expanduser())
    stream = FusionStream(own, anchor, pairing.pairs, Edit(dict.fromkeys(pairing.pairs, USUAL_ALPHA)))
    behaviour, run_in = None, None
    with reporting(progress), collecting_warnings() as told:
        stream.measure()
        if read is not None:
            run_in = running.run_in()
            with tempfile.TemporaryDirectory(prefix="lightning-rejuv-") as scratch:
                behaviour = measure_behaviour(
                    pairing, read, check, running.device, DTYPES[run_in], Path(scratch)
                )
    record, recorded = find_record(own, anchor)
    findings = [*recorded, *check_beside_base(pairing), *(check_ends(own, read) if read else ())]
    same_vocabulary = pairing.rows is None or pairing.rows.identity
    unchanged = same_vocabulary and not any(s.difference for s in stream.measured.values())
    verdict = verdict_on(behaviour)
    recommendation, alpha = recommend(verdict, behaviour, record, unchanged)
    return Diagnosis(
        base=str(base),
        sft=str(sft),
        tensors=stream.measured,
        findings=(
            *findings,
            *(Finding("config", None, text) for text in warnings),
            *(Finding("calibration", None, text) for text in told),
        ),
        behaviour=behaviour,
        verdict=verdict.level,
        reasons=verdict.reasons,
        recommendation=recommendation,
        alpha=alpha,
        rejuvenated=record,
        device=running.device if run_in else None,
        compute_dtype=run_in,
    )


def _verifier(given: str | Callable[[str, str], object] | None) -> Callable[[str, str], object] | None:
    """Return the verifier that was brought, or named, once it is known that it can be called."""
    if given is None:
        return None
    verifier = import_verifier(given) if isinstance(given, str) else given
    check_verifier(verifier, ("prompt", "response"))
    return verifier


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
