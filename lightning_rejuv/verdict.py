"""From measures to a judgement that a person can act on: the monitor's, and that of ``diagnose``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Level = Literal["healthy", "at risk", "over-confident", "cannot start", "unknown"]

#: What repeated sampling gains, as a share of what independent rollouts of the same pass@1 would gain. At the study's
#: retail desk (docs/evidence-appendix.md, "The verdict") most starts below the first fail, nearly all above the second
#: succeed; on a real model excessive SFT has at most .25, and most of it fails; nearly all that RL improves has at
#: least .5.
GAIN_OVER_CONFIDENT, GAIN_AT_RISK = 0.05, 0.3
#: The same of a model whose own entropy is over-confident: a few prompts that it can still do must not acquit it.
GAIN_SURE = 0.6
#: Pass@k below which a few right rollouts may be luck, and from which on nearly every prompt has a right one.
PASS_AT_RISK, PASS_SOLVED = 0.05, 0.9
#: Prompts with a right rollout below which they may be luck: a start that RL failed to improve has one right in 256
#: rollouts; among 16 prompts with 8 each, one has a right one with a probability of 0.39, three with one of 0.01.
SOLVED_AT_RISK = 3
#: Prompts below which rollouts that are all wrong, or equal within each group, decide nothing: of a model that is right
#: in one of 20, which RL improves, 64 are all wrong with a probability of 0.04, 8 with one of 0.66.
ENOUGH_GROUPS = 8
#: Rollouts that are right less than so many times as often as answers to another prompt would be may be guesses, which
#: differ within a group whatever the model has lost. They speak for a model only if its entropy is close to the base's.
GUESSED, ENTROPY_KEPT = 1.5, 0.9
#: Share of groups without a learning signal, used if no pass@k of k > 1 is known: .63 in the worst start of a real
#: model that RL rescued, .91 in the best that it did not.
ZERO_VARIANCE_AT_RISK = 0.75
#: Token entropy over the base's. A base that does not know the format is unsure of it, so that what SFT has rightly
#: taught lowers the ratio as well, and recipes differ (docs/evidence-appendix.md): excessive SFT has 0.04 in one and
#: 0.14 in the other, a start that RL improves 0.09 in the first. In the study hardly a start below the second is
#: improved in one of the tasks.
ENTROPY_OVER_CONFIDENT, ENTROPY_AT_RISK = 0.05, 0.3
#: Token entropy over the negative log-likelihood of held-out demonstrations, 1 for a calibrated model; judged if
#: the entropy is below ENTROPY_LOW of the base's, since a model that has not learned them has a low one as well.
#: On a real model: .11 and .13 in excessive SFT, from .39 on in starts that RL improves.
CALIBRATION_OVER_CONFIDENT, CALIBRATION_AT_RISK = 1 / 3, 2 / 3
ENTROPY_LOW = 0.5
#: Probability of the demonstrated format, without rollouts.
FORMAT_CANNOT_START, FORMAT_AT_RISK = 0.01, 0.1

_ADVICE: dict[Level, str] = {
    "healthy": "There is nothing to do: start RL from this model.",
    "at risk": "Sample more rollouts with rewards before a long run; rejuvenate it, or take an earlier checkpoint, if "
    "they are right or wrong by prompt alone.",
    "over-confident": "Rejuvenate it, or take an earlier checkpoint of its SFT.",
    "cannot start": "RL would have nothing to reward: if it was rejuvenated, take a larger alpha or a refit; otherwise "
    "do more SFT, or start with easier prompts.",
    "unknown": "Sample a few rollouts with rewards, 8 to each of 16 prompts or more: they tell.",
}
#: What a model that cannot start is told to do, by what its format says.
_MISSING: dict[Level, str] = {
    "cannot start": "The format is missing: if it was rejuvenated, take a larger alpha or a refit; otherwise do more "
    "SFT.",
    "healthy": "The format is there, the skill is missing: do SFT on demonstrations of it, or start with easier "
    "prompts.",
}
_SOLVED = (
    "There is nothing to do, and little for RL to do on these prompts, which it solves: take harder ones."
)
_DIVERGED = "It has diverged: take an earlier checkpoint, or train it anew with a smaller learning rate."
_PASS_AT = re.compile(r"pass_at_(\d+)")


class Reason(NamedTuple):
    """One measure's contribution to a verdict.

    Attributes:
        measure: its name.
        level: what it speaks for; "unknown" if too little was measured.
        text: a sentence with figures.
        advice: what to do if it decides, unless that is what the level alone says.
    """

    measure: str
    level: Level
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether RL can be expected to improve a model, what is wrong if not, and why.

    Attributes:
        level: "healthy"; "over-confident": its rollouts to a prompt are all right or all wrong, and RL finds no
            alternatives; "cannot start": no rollout is right, since the format or the skill is missing; "at risk"
            if the measures do not decide between those; "unknown" if nothing that tells was measured.
        reasons: each measure that was judged, the one that decided first.
    """

    level: Level
    reasons: tuple[Reason, ...]

    @property
    def deciding(self) -> Reason | None:
        """The reason that decided; None if nothing did."""
        return self.reasons[0] if self.reasons and self.level != "unknown" else None

    @property
    def advice(self) -> str:
        """What to do, in a sentence."""
        if self.deciding and self.deciding.advice:
            return self.deciding.advice
        form: Level = next((r.level for r in self.reasons if r.measure == "format_probability"), "unknown")
        missing = _MISSING if self.level == "cannot start" else {}
        return missing.get(form, _ADVICE[self.level])

    def __str__(self) -> str:
        return "\n".join([self.level] + [f"- {reason.text} [{reason.level}]" for reason in self.reasons])


def judge(values: Mapping[str, float], base: Mapping[str, float] | None = None) -> Verdict:
    """Judge the measures of a model from which RL is to start, against the base's on the same positions.

    Rollouts with rewards come first. Pass@k, beside pass@1, tells whether a right rollout can be found, and
    whether further rollouts to a prompt find what the first did not: of an over-confident model they are all
    right or all wrong. Entropy then says which of two names fits if few or none are right; and if it
    is over-confident, repeated sampling has to gain more, since a few prompts may be what the model can still do.

    Without rollouts a low entropy, relative to the base's and to what held-out demonstrations cost, makes a model
    over-confident, and a lost format of the demonstrations makes it unable to start. Entropy alone never makes it
    healthy: of a model that has lost the format, or never had it, it is the base's.

    If the number of groups is known, a verdict claims no more than so many can show: fewer than 8 decide nothing
    if none of their rollouts is right, and they make no model over-confident; and a model is healthy only if 3 prompts
    have a right rollout.

    Support retention, drift, dormancy and effective rank are never judged. The first punishes what SFT has
    rightly taught, the others did not tell success from failure.

    The monitor and ``diagnose`` both ask here: there is one verdict, one set of words and of thresholds.

    Args:
        values: ``pass_at_1``, ``pass_at_<k>``, ``zero_variance_fraction`` and ``token_entropy`` by the names of
            :meth:`PlasticityMonitor.compute`; ``rollout_groups``, to how many prompts;
            ``chance_pass_at_1``, the share of rollouts that would be right answers
            to another prompt; ``token_nll``, the mean negative log-likelihood of the tokens of
            held-out demonstrations, nats; ``format_probability``, see
            :func:`~lightning_rejuv.attribution.demonstrated_format.format_probability`. Others are ignored.
        base: the base's values: ``token_entropy``.

    >>> print(judge({"pass_at_1": 0.12, "pass_at_8": 0.13, "zero_variance_fraction": 0.97}))
    over-confident
    - pass@8 is 0.13 beside a pass@1 of 0.12: repeated sampling gains 0.02 of what independent rollouts would
    (over-confident below 0.05, at risk below 0.3); 97% of the groups carry no learning signal [over-confident]
    """
    model = [reason for reason in (_entropy(values, base or {}), _calibration(values, base or {})) if reason]
    rigid = any(reason.level == "over-confident" for reason in model)
    rollouts = _rollouts(values, _ratio(values, base or {}), rigid)
    form = _format(values)
    level, deciding = _decide(rollouts, model, form)
    reasons = [reason for reason in (rollouts, *model, form) if reason is not None]
    return Verdict(level, tuple(sorted(reasons, key=lambda reason: reason is not deciding)))


def _decide(rollouts: Reason | None, model: list[Reason], form: Reason | None) -> tuple[Level, Reason | None]:
    """Return the level and the reason that decided it."""
    diverged = next((reason for reason in model if reason.level == "cannot start"), None)
    if diverged is not None:
        return "cannot start", diverged
    rigid = next((reason for reason in model if reason.level == "over-confident"), None)
    if rollouts is not None and rollouts.level != "unknown":
        if rigid is not None and rollouts.level in ("at risk", "cannot start"):
            return "over-confident", rigid
        return rollouts.level, rollouts
    if form is not None and form.level == "cannot start":
        return "cannot start", form
    doubtful = next((reason for reason in (*model, form) if reason and reason.level == "at risk"), None)
    worst = rigid or doubtful
    if worst is not None:
        return worst.level, worst
    return ("healthy", model[0]) if model and form is not None else ("unknown", None)


def _graded(value: float, at_risk: float, over_confident: float) -> Level:
    if value < over_confident:
        return "over-confident"
    return "at risk" if value < at_risk else "healthy"


def _rollouts(values: Mapping[str, float], entropy_ratio: float | None, rigid: bool) -> Reason | None:
    """Judge pass@k of the largest k beside pass@1; if there is none, the groups without a signal."""
    known = {int(m[1]): float(v) for name, v in values.items() if (m := _PASS_AT.fullmatch(name)) and v == v}
    zero = values.get("zero_variance_fraction", math.nan)
    groups = values.get("rollout_groups", math.inf)
    few = _too_few(groups)
    largest = max(known, default=0)
    if largest and known[largest] == 0:
        text = f"pass@{largest} is 0: no rollout is right, and RL has nothing to reward{few}"
        return Reason(f"pass_at_{largest}", "unknown" if few else "cannot start", text)
    if largest == 1 or 1 not in known:
        return _zero_variance(float(zero), known.get(1), few) if zero == zero else None
    level, why = _gain(largest, known[1], known[largest], GAIN_SURE if rigid else GAIN_AT_RISK)
    if level == "over-confident" and few:
        level, why = "at risk", why + few
    solved = known[largest] * groups
    if solved < SOLVED_AT_RISK - 0.5 and level == "healthy":
        level = "at risk"
        why += f"; right rollouts to {solved:.0f} of {groups:.0f} prompts may be luck"
        why += f" (at risk below {SOLVED_AT_RISK})"
    chance = values.get("chance_pass_at_1", 0.0)
    if known[1] < GUESSED * chance:
        why += f"; answers to other prompts would be right in {chance:.2f}, so that these may be guesses"
        if level == "healthy" and not (entropy_ratio is not None and entropy_ratio >= ENTROPY_KEPT):
            level = "at risk"
    if zero == zero:
        why += f"; {zero:.0%} of the groups carry no learning signal"
    text = f"pass@{largest} is {known[largest]:.2f} beside a pass@1 of {known[1]:.2f}: {why}"
    return Reason(f"pass_at_{largest}", level, text, _SOLVED * (known[1] >= PASS_SOLVED))


def _too_few(groups: float) -> str:
    """Return what is to be added if so many groups decide nothing; nothing if they are enough."""
    if groups >= ENOUGH_GROUPS:
        return ""
    return (
        f", but {groups:.0f} prompt{'s are' if groups != 1 else ' is'} too few to tell ({ENOUGH_GROUPS} tell)"
    )


def _gain(k: int, pass_at_1: float, pass_at_k: float, at_risk: float) -> tuple[Level, str]:
    """Return the level that pass@k beside pass@1 speaks for, and why."""
    if pass_at_k >= PASS_SOLVED:
        return "healthy", "nearly every prompt has a right rollout"
    most = 1 - (1 - pass_at_1) ** k - pass_at_1
    gain = (pass_at_k - pass_at_1) / most if most > 0 else 1.0  # a pass@1 that was rounded to 0
    level = _graded(gain, at_risk, GAIN_OVER_CONFIDENT)
    if level == "healthy" and pass_at_k < PASS_AT_RISK:
        return "at risk", f"few rollouts are right (at risk below {PASS_AT_RISK:g})"
    return level, (
        f"repeated sampling gains {gain:.2f} of what independent rollouts would (over-confident below "
        f"{GAIN_OVER_CONFIDENT:g}, at risk below {at_risk:g})"
    )


def _zero_variance(value: float, pass_at_1: float | None, few: str) -> Reason:
    mostly_right = pass_at_1 is not None and pass_at_1 > 0.5  # equal groups are a success then
    level: Level = "healthy" if value <= ZERO_VARIANCE_AT_RISK or mostly_right else "at risk"
    text = f"{value:.0%} of the rollout groups carry no learning signal (at risk above {ZERO_VARIANCE_AT_RISK:.0%})"
    solved = pass_at_1 is not None and pass_at_1 >= PASS_SOLVED
    return Reason("zero_variance_fraction", "unknown" if few else level, text + few, _SOLVED * solved)


def _ratio(values: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    reference = float(base.get("token_entropy", 0.0))
    return float(values["token_entropy"]) / reference if "token_entropy" in values and reference > 0 else None


def _entropy(values: Mapping[str, float], base: Mapping[str, float]) -> Reason | None:
    if math.isnan(values.get("token_entropy", 0.0)):
        return Reason(
            "token_entropy", "cannot start", "token entropy is NaN: the model has diverged", _DIVERGED
        )
    ratio = _ratio(values, base)
    if ratio is None:
        return None
    text = (
        f"token entropy {values['token_entropy']:.3f} nats is {ratio:.2f} of the base's {base['token_entropy']:.3f} "
        f"(over-confident below {ENTROPY_OVER_CONFIDENT:g}, at risk below {ENTROPY_AT_RISK:g})"
    )
    return Reason("token_entropy", _graded(ratio, ENTROPY_AT_RISK, ENTROPY_OVER_CONFIDENT), text)


def _calibration(values: Mapping[str, float], base: Mapping[str, float]) -> Reason | None:
    ratio, nll = _ratio(values, base), float(values.get("token_nll", 0.0))
    if ratio is None or not ratio < ENTROPY_LOW or not nll > 0:
        return None
    expected = float(values["token_entropy"]) / nll
    text = (
        f"held-out demonstrations cost {nll:.3f} nats a token where the model expects {values['token_entropy']:.3f}, "
        f"{expected:.2f} of it (over-confident below {CALIBRATION_OVER_CONFIDENT:.2f}, at risk below "
        f"{CALIBRATION_AT_RISK:.2f})"
    )
    return Reason("token_nll", _graded(expected, CALIBRATION_AT_RISK, CALIBRATION_OVER_CONFIDENT), text)


def _format(values: Mapping[str, float]) -> Reason | None:
    value = float(values.get("format_probability", math.nan))
    if math.isnan(value):
        return None
    too_low: Level = "cannot start" if value < FORMAT_CANNOT_START else "at risk"
    text = (
        f"the format that the demonstrations share has a probability of {value:.3f} (cannot start below "
        f"{FORMAT_CANNOT_START:g}, at risk below {FORMAT_AT_RISK:g})"
    )
    return Reason("format_probability", "healthy" if value >= FORMAT_AT_RISK else too_low, text)
