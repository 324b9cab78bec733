"""Rows of a report's table, which reports on models and on directories share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_rejuv.alpha.search import AlphaSearch
    from lightning_rejuv.refit import RefitReport

_CURVE = (
    ("alpha tried", "alpha"),
    ("demonstrations", "demonstrations"),
    ("base samples", "base_samples"),
)

# The narrowest range of alphas in which RL was seen to succeed is .15 wide (.40 to .55, on a real model): a shift of
# less than a seventh of it changes no decision.
_NO_SHIFT = 0.02


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


def row(title: str, text: str) -> str:
    """Return a line of the table."""
    return f"  {title:<17}{text}"
