"""A rejuvenation report as the table that ``print`` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_rejuv.alpha import AlphaSearch
from lightning_rejuv.report_layers import table, where

if TYPE_CHECKING:
    from lightning_rejuv.refit import RefitReport
    from lightning_rejuv.report import RejuvenationReport

_TENSORS = 4
_CURVE = (
    ("alpha tried", "alpha"),
    ("demonstrations", "demonstrations"),
    ("base samples", "base_samples"),
)

# The narrowest range of alphas in which RL was seen to succeed is .15 wide (.40 to .55, on a real model): a shift of
# less than a seventh of it changes no decision.
_NO_SHIFT = 0.02


def lines(report: RejuvenationReport) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"Rejuvenation toward {report.anchor}"
    yield from _alpha(report)
    yield _row(
        "drift",
        f"{report.drift_before:#.3g} -> {measured(report.drift_after)}  (‖w - b‖ / ‖b‖, all parameters)",
    )
    furthest = sorted(report.tensors, key=lambda tensor: -tensor.drift_before)[:_TENSORS]
    for number, tensor in enumerate(furthest):
        drift = f"{tensor.drift_before:#.3g} -> {measured(tensor.drift_after)}"
        yield _row("  furthest" if number == 0 else "", f"{drift}  {tensor.name}")
    if report.comparison:
        c = report.comparison
        after = measured(c.entropy_after, ".4f")
        entropy = f"{c.entropy_before:.4f} -> {after} nats  (anchor {c.entropy_base:.4f})"
        yield _row("token entropy", f"{entropy}, teacher-forced on the calibration responses")
    if report.attribution:
        yield from _neurons(report)
    if report.refit:
        for title, text in refit_rows(report.refit, report.search is None):
            yield _row(title, text)
    if report.rounding_shift is not None:
        remedy = "a float32 model" + (' or `rounding="stochastic"`' if report.rounding == "nearest" else "")
        yield _row("rounding", rounding(report.rounding_shift, remedy))
    if report.optimizer_state_left:
        count = len(report.optimizer_state_left)
        yield _row(
            "optimizer",
            f"the state of {count} parameters could not be edited, e.g. of {report.optimizer_state_left[0]}",
        )
    yield from _buffers(report)
    memory = (
        ""
        if report.peak_memory is None
        else f", peak memory of the process {report.peak_memory / 2**20:.0f} MiB"
    )
    yield _row("cost", f"{report.seconds:.2f} s{memory}")


def search_rows(search: AlphaSearch, curve: bool = True) -> Iterator[tuple[str, str]]:
    """Yield title and text of the rows on a search for alpha; ``curve`` is what was measured at each alpha."""
    kept = f"{search.taught:.0%} of what SFT taught and {search.kept:.0%} of the base's support are kept"
    yield "  found by", f"{search.rule}: {kept}; the bargain of both is at {search.bargain:.2f}"
    for title, name in _CURVE if curve else ():
        yield f"  {title}", " ".join(f"{getattr(point, name):>6.4g}" for point in search.curve)
    if curve:
        samples = f"{search.responses} base samples{_unfinished(search.unfinished)}"
        yield "", f"negative log-likelihoods, nats a response; {samples}"
    if search.right is not None:
        yield "  rollouts", f"{search.right:.0%} of {search.judged} at this alpha are right"
    yield from (("  doubt", doubt) for doubt in search.doubts)


def refit_rows(refit: RefitReport, doubts: bool = True) -> Iterator[tuple[str, str]]:
    """Yield title and text of the rows on a refit; a search with the same samples has told the ``doubts`` already."""
    what = f"{refit.steps} steps of AdamW at {refit.learning_rate:g}, {refit.batch_size} responses each"
    yield "refit", f"{what}, {refit.weights:,} weights, {refit.seconds:.1f} s"
    yield (
        "  its loss",
        f"{refit.joint_before:.3f} -> {refit.joint_after:.3f} nats a response, over all of them",
    )
    demonstrations = f"{refit.demonstrations_before:.3f} -> {refit.demonstrations_after:.3f}"
    yield "", f"{demonstrations} over {refit.demonstrations} calibration responses"
    own = f"{refit.base_samples_before:.3f} -> {refit.base_samples_after:.3f}"
    own += f" over {refit.base_samples} responses that the base sampled"
    yield "", own + _unfinished(refit.unfinished)
    if doubts:
        yield from (("  doubt", doubt) for doubt in refit.doubts)


def _unfinished(count: int | None) -> str:
    return f", {count} of them unfinished" if count else ""


def rounding(shift: float, remedy: str) -> str:
    """Say what rounding to a half type did to a fusion, and whether there is anything to do about it.

    Args:
        shift: of alpha, see :func:`lightning_rejuv.weights.edit.rounding_sums`.
        remedy: what keeps alpha.

    >>> print(rounding(-0.292, "`--rounding stochastic`"))
    shifts alpha by -0.292, toward the base: `--rounding stochastic` keeps it
    >>> print(rounding(0.0004, "`--rounding stochastic`"))
    shifts alpha by +0.000: nothing to do
    """
    if abs(shift) < _NO_SHIFT:
        return f"shifts alpha by {shift:+.3f}: nothing to do"
    return (
        f"shifts alpha by {shift:+.3f}, toward the {'base' if shift < 0 else 'SFT model'}: {remedy} keeps it"
    )


def measured(value: float | None, form: str = "#.3g") -> str:
    """Format what is measured after an edit, and may then not have been measurable."""
    return "not measured" if value is None else f"{value:{form}}"


def _row(title: str, text: str) -> str:
    return f"  {title:<17}{text}"


def _alpha(report: RejuvenationReport) -> Iterator[str]:
    if isinstance(report.alpha, dict):
        for number, (pattern, value) in enumerate(report.alpha.items()):
            yield _row("" if number else "alpha", f"{value:.3f}  {pattern}")
        return
    yield _row("alpha", f"{report.alpha:.3f}  (weight of the SFT model)")
    if report.search:
        for title, text in search_rows(report.search):
            yield _row(title, text)


def _buffers(report: RejuvenationReport) -> Iterator[str]:
    fused, kept, statistics = report.buffers_fused, report.buffers_kept, report.running_statistics
    if fused or kept:
        text = f"{len(fused)} fused like the parameters"
        if kept:
            text += f", {len(kept)} left, since the anchor does not hold them, e.g. {kept[0]}"
        yield _row("buffers", text)
    if statistics and (kept or report.drift_after != 0):
        text = f"of {len(statistics)} layers, e.g. {statistics[0]!r}, do not fit the edited weights exactly"
        yield _row("statistics", f"{text}: recompute them (torch.optim.swa_utils.update_bn)")


def _asked(report: RejuvenationReport) -> Iterator[str]:
    """Say why fewer neurons were reset than were asked for."""
    asked = report.neurons_asked
    if asked is None or (asked and asked == report.neurons_reset):
        return
    assert report.reset is not None
    assert report.attribution is not None
    text = f"{asked} ({report.reset.fraction:.2%})"
    if not asked:
        yield _row("  asked for", f"{text}, which is less than half a neuron")
        return
    why = "; the score of the others is not positive"
    if report.attribution.quantity == "entropy_gradient":
        why += ": their reset would not raise the entropy"
    yield _row("  asked for", text + why)


def _neurons(report: RejuvenationReport) -> Iterator[str]:
    found = report.attribution
    assert found is not None
    assert report.reset is not None
    total = max(1, report.neurons_total)
    count = f"{report.neurons_reset} of {report.neurons_total} ({report.neurons_reset / total:.2%})"
    yield _row(
        "neurons reset", f"{count}, ranked {found.rank_by} by {found.quantity}, omega {report.reset.omega:g}"
    )
    yield from _asked(report)
    if report.comparison:
        c = report.comparison
        split = f"{c.sharpened} sharpened, {c.learned} learned"
        yield _row("positions", f"{found.positions} ({c.rule}): {split}")
    if found.reconstruction_error is not None:
        yield _row("reconstruction", f"error {found.reconstruction_error:.1e} of the target logits, at most")
    if report.neurons_reset:
        yield _row("reset in", where(report.neurons_by_layer))
        for title, text in table(report.neurons_by_layer):
            yield _row(f"  {title}", text)
