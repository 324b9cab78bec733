"""From measures to a judgement that a person can act on: the monitor's, and that of ``diagnose``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Level = Literal["plastic", "at risk", "collapsed", "unknown"]

_SEVERITY: dict[Level, int] = {"unknown": -1, "plastic": 0, "at risk": 1, "collapsed": 2}

#: Support retention, nats a response of 10 to 25 tokens. In the study (docs/evidence.md, "The verdict") RL from
#: over-trained starts mostly succeeds above the first and hardly ever below the second.
RETENTION_AT_RISK, RETENTION_COLLAPSED = -2.0, -8.0
RETENTION_TOKENS = 25
#: Entropy over the base's: a fall by half is the alarm of arXiv 2606.18487; the collapsed model of arXiv
#: 2606.09932 has 0.024 nats where the barely tuned one has 0.281, a ratio of 0.085.
ENTROPY_AT_RISK, ENTROPY_COLLAPSED = 0.5, 0.1
#: Share of groups without a learning signal: at a half, p*(g) of arXiv 2606.18487.
ZERO_VARIANCE_AT_RISK, ZERO_VARIANCE_COLLAPSED = 0.5, 0.95


class Reason(NamedTuple):
    """One measure's contribution to a verdict."""

    measure: str
    level: Level
    text: str


@dataclass(frozen=True)
class Verdict:
    """Whether RL can be expected to improve a model, and why.

    Attributes:
        level: "plastic", "at risk", "collapsed", or "unknown" where nothing that tells was measured.
        reasons: each measure that was judged, the strongest evidence first.
    """

    level: Level
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        return "\n".join([self.level] + [f"- {reason.text} [{reason.level}]" for reason in self.reasons])


def judge(
    values: Mapping[str, float], base: Mapping[str, float] | None = None, response_tokens: float | None = None
) -> Verdict:
    """Judge measures against the base's on the same positions.

    Support retention decides alone where it was measured: on over-trained starts it is the best forecast of
    RL (docs/evidence.md), and the others, which are listed beside it, add none to it: most starts that groups
    without a learning signal mark succeed. Without it the worst of them decides. Dormancy, drift and
    effective rank are never judged: they did not tell success from failure.

    The monitor and ``diagnose`` both ask here: there is one verdict, one set of words and of thresholds.

    Args:
        values: the measures by the names that :meth:`PlasticityMonitor.compute` gives them; others are ignored.
        base: the base's values on the same positions.
        response_tokens: mean length of the base's responses that retention was measured on. Thresholds are
            for 10 to 25 tokens and are scaled up with the length beyond, which is an extrapolation.

    >>> print(judge({"token_entropy": 0.024}, {"token_entropy": 0.281}))
    collapsed
    - token entropy 0.024 nats is 0.09 of the base's 0.281 (at risk below 0.5, collapsed below 0.1)
    [collapsed]
    """
    reasons = [
        reason
        for reason in (
            _retention(values, response_tokens),
            _entropy(values, base or {}),
            _zero_variance(values),
        )
        if reason is not None
    ]
    if not reasons:
        return Verdict("unknown", ())
    judged = reasons[:1] if reasons[0].measure == "support_retention" else reasons
    level = max((reason.level for reason in judged), key=_SEVERITY.__getitem__)
    return Verdict(level, tuple(reasons))


def _graded(value: float, at_risk: float, collapsed: float) -> Level:
    """Grade a value of which less is worse; NaN is what a diverged model gives."""
    if math.isnan(value) or value < collapsed:
        return "collapsed"
    return "at risk" if value < at_risk else "plastic"


def _retention(values: Mapping[str, float], tokens: float | None) -> Reason | None:
    if "support_retention" not in values:
        return None
    value = float(values["support_retention"])
    scale = max(1.0, (tokens or 0.0) / RETENTION_TOKENS)
    at_risk, collapsed = scale * RETENTION_AT_RISK, scale * RETENTION_COLLAPSED
    likely = "less likely" if value < 0 else "more likely"
    text = (
        f"the base's own responses are {abs(value):.2f} nats a response {likely} than under the base "
        f"(at risk below {at_risk:g}, collapsed below {collapsed:g})"
    )
    return Reason("support_retention", _graded(value, at_risk, collapsed), text)


def _entropy(values: Mapping[str, float], base: Mapping[str, float]) -> Reason | None:
    reference = float(base.get("token_entropy", 0.0))
    if "token_entropy" not in values or not reference > 0:
        return None
    value = float(values["token_entropy"])
    ratio = value / reference
    text = (
        f"token entropy {value:.3f} nats is {ratio:.2f} of the base's {reference:.3f} "
        f"(at risk below {ENTROPY_AT_RISK:g}, collapsed below {ENTROPY_COLLAPSED:g})"
    )
    return Reason("token_entropy", _graded(ratio, ENTROPY_AT_RISK, ENTROPY_COLLAPSED), text)


def _zero_variance(values: Mapping[str, float]) -> Reason | None:
    if "zero_variance_fraction" not in values or float(values.get("pass_at_1", 0.0)) > 0.5:
        # Where most rollouts succeed, equal groups are a success and no symptom.
        return None
    value = float(values["zero_variance_fraction"])
    text = (
        f"{value:.0%} of the rollout groups carry no learning signal "
        f"(at risk above {ZERO_VARIANCE_AT_RISK:.0%}, collapsed above {ZERO_VARIANCE_COLLAPSED:.0%})"
    )
    level = _graded(-value, -ZERO_VARIANCE_AT_RISK, -ZERO_VARIANCE_COLLAPSED)
    return Reason("zero_variance_fraction", level, text)
