"""The verdict: each limit from both sides, every combination of measures, known starts, every sentence."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest

from lightning_rejuv import verdict
from lightning_rejuv.verdict import Reason, Verdict, judge

BELOW, ABOVE = -math.inf, math.inf
BASE = {"token_entropy": 1.0}


def just(value: float, toward: float) -> float:
    """The next float64: no limit can move, and no comparison turn, without a neighbour noticing."""
    return math.nextafter(value, toward)


def level_of(measure: str, values, base=BASE) -> str:
    (reason,) = [reason for reason in judge(values, base).reasons if reason.measure == measure]
    return reason.level


def test_the_limits_are_the_documented_ones():
    assert (verdict.GAIN_OVER_CONFIDENT, verdict.GAIN_AT_RISK) == (0.05, 0.3)
    assert verdict.GAIN_SURE == 0.6
    assert (verdict.GUESSED, verdict.ENTROPY_KEPT) == (1.5, 0.9)
    assert (verdict.PASS_AT_RISK, verdict.PASS_SOLVED, verdict.ZERO_VARIANCE_AT_RISK) == (0.05, 0.9, 0.75)
    assert (verdict.ENTROPY_OVER_CONFIDENT, verdict.ENTROPY_AT_RISK, verdict.ENTROPY_LOW) == (0.05, 0.3, 0.5)
    assert (verdict.SOLVED_AT_RISK, verdict.ENOUGH_GROUPS) == (3, 8)
    assert (verdict.CALIBRATION_OVER_CONFIDENT, verdict.CALIBRATION_AT_RISK) == (1 / 3, 2 / 3)
    assert (verdict.FORMAT_CANNOT_START, verdict.FORMAT_AT_RISK) == (0.01, 0.1)


# Of a pass@1 of .5, two independent rollouts would solve .75 of the prompts: a gain of .25. Powers of two are exact.
@pytest.mark.parametrize(
    ("gain", "level"),
    [
        (0.0, "over-confident"),
        (0.046875, "over-confident"),
        (0.0625, "at risk"),
        (0.3 - 2**-40, "at risk"),
        (0.3 + 2**-40, "healthy"),
        (1.0, "healthy"),
        (1.2, "healthy"),
    ],
)
def test_what_repeated_sampling_gains(gain, level):
    values = {"pass_at_1": 0.5, "pass_at_2": 0.5 + 0.25 * gain}
    assert judge(values).level == level
    assert f"gains {gain:.2f} of" in judge(values).reasons[0].text


@pytest.mark.parametrize(
    ("gain", "level"), [(0.34, "over-confident"), (0.59, "over-confident"), (0.61, "healthy")]
)
def test_an_over_confident_entropy_asks_for_a_larger_gain(gain, level):
    """Excessive SFT of recipe V on the prompts of two kinds, one of which it can do: .34."""
    rollouts = {"pass_at_1": 0.5, "pass_at_2": 0.5 + 0.25 * gain}
    assert judge(rollouts, BASE).level == "healthy"
    assert judge({**rollouts, "token_entropy": 0.13, "token_nll": 1.3}, BASE).level == level


def test_the_gain_is_that_of_rollouts_that_depend_on_the_prompt_alone_or_not_at_all():
    """By brute force: groups of 4 of which each prompt has its own probability, all outcomes enumerated."""

    def passes(probabilities, k):
        solved = [
            math.prod(p if right else 1 - p for right in outcome) * any(outcome)
            for p in probabilities
            for outcome in itertools.product((False, True), repeat=k)
        ]
        return sum(solved) / len(probabilities)

    for probabilities, gain in (([0.25] * 4, "1.00"), ([1.0, 0.0, 0.0, 0.0], "0.00"), ([0.5, 0.0], "0.50")):
        values = {f"pass_at_{k}": passes(probabilities, k) for k in (1, 4)}
        assert f"gains {gain} of what independent" in judge(values).reasons[0].text


def test_none_right_some_right_and_nearly_all_solved():
    assert judge({"pass_at_8": 0.0, "pass_at_1": 0.0}).level == "cannot start"
    assert judge({"pass_at_1": 0.0}).level == "cannot start"
    few = {"pass_at_1": 0.01}
    assert judge({**few, "pass_at_8": just(0.05, BELOW)}).level == "at risk"
    assert judge({**few, "pass_at_8": 0.05}).level == "healthy"
    assert judge({"pass_at_1": 0.0, "pass_at_8": 0.031}).level == "at risk"  # a pass@1 that was rounded
    solved = {"pass_at_1": 0.88}
    assert judge({**solved, "pass_at_8": just(0.9, BELOW)}).level == "at risk"  # as much by prompt alone
    assert judge({**solved, "pass_at_8": 0.9}).level == "healthy"
    assert judge({"pass_at_1": 1.0, "pass_at_8": 1.0, "zero_variance_fraction": 1.0}).level == "healthy"


def of_counts(right, group=8):
    """What rollouts come to of which so many are right, a number for each prompt."""
    return {
        "pass_at_1": sum(right) / len(right) / group,
        f"pass_at_{group}": sum(one > 0 for one in right) / len(right),
        "zero_variance_fraction": sum(one in (0, group) for one in right) / len(right),
        "rollout_groups": float(len(right)),
    }


@pytest.mark.parametrize(
    ("right", "level", "rigid"),
    [
        ([1] + [0] * 15, "at risk", "over-confident"),  # one lucky rollout acquits nobody
        ([5] + [0] * 15, "at risk", "over-confident"),
        ([1, 1] + [0] * 14, "at risk", "over-confident"),
        ([1, 1, 1] + [0] * 13, "healthy", "healthy"),
        ([1] * 3 + [0] * 57, "healthy", "healthy"),  # 3 of 60 are .05
        ([1] * 3 + [0] * 58, "at risk", "over-confident"),
        ([8] + [0] * 15, "over-confident", "over-confident"),
        ([0] * 16, "cannot start", "over-confident"),
        ([0] * 8, "cannot start", "over-confident"),
        ([0] * 7, "unknown", "over-confident"),  # too few to tell; the entropy decides
        ([0], "unknown", "over-confident"),
        ([8, 0], "at risk", "over-confident"),  # an easy prompt and a hard one
        ([8] * 4 + [0] * 4, "over-confident", "over-confident"),
        ([4], "at risk", "over-confident"),
        ([4, 4], "at risk", "over-confident"),
        ([4, 4, 4], "healthy", "healthy"),
        ([8] * 16, "healthy", "healthy"),
    ],
)
def test_a_verdict_claims_no_more_than_so_many_rollouts_show(right, level, rigid):
    values = of_counts(right)
    assert judge(values).level == level
    assert judge({**values, "token_entropy": 0.01, "token_nll": 1.0}, BASE).level == rigid


def test_one_right_of_256_is_hardly_ever_called_healthy():
    """The worst start that RL failed to improve on a real model: drawn as often as `diagnose` would draw."""
    random = numpy.random.default_rng(0)
    levels = [judge(of_counts(list(random.binomial(8, 1 / 256, 16)))).level for _ in range(2000)]
    assert levels.count("healthy") / len(levels) < 0.03
    assert levels.count("at risk") / len(levels) == pytest.approx(0.38, abs=0.05)


@pytest.mark.parametrize("groups", [1, 2, 4, 7])
def test_a_model_that_is_right_now_and_then_is_never_condemned_by_a_few_rollouts(groups):
    random = numpy.random.default_rng(0)
    drawn = [judge(of_counts(list(random.binomial(8, 0.05, groups)))).level for _ in range(300)]
    assert set(drawn) <= {"unknown", "at risk", "healthy"}


def test_few_groups_without_a_signal_decide_nothing():
    assert judge({"zero_variance_fraction": 1.0, "rollout_groups": 7.0}).level == "unknown"
    assert judge({"zero_variance_fraction": 1.0, "rollout_groups": 8.0}).level == "at risk"
    healthy = {"token_entropy": 0.9, "format_probability": 0.9}
    assert judge({"zero_variance_fraction": 1.0, "rollout_groups": 7.0, **healthy}, BASE).level == "healthy"


GUESSES = {"pass_at_1": 0.125, "pass_at_8": 0.6}


@pytest.mark.parametrize(
    ("chance", "entropy", "level"),
    [
        (0.125 / 1.5 - 2**-40, None, "healthy"),
        (0.125 / 1.5 + 2**-40, None, "at risk"),
        (0.125, just(0.9, BELOW), "at risk"),
        (0.125, 0.9, "healthy"),
        (0.125, 0.01, "over-confident"),
    ],
)
def test_what_may_be_guessed_speaks_for_a_model_only_if_its_entropy_is_kept(chance, entropy, level):
    known = {} if entropy is None else {"token_entropy": entropy}
    found = judge({**GUESSES, **known, "chance_pass_at_1": chance}, BASE)
    assert found.level == level
    guessed = chance > 0.1
    assert (
        any("right in 0.1" in reason.text and "guesses" in reason.text for reason in found.reasons) is guessed
    )


def test_guesses_do_not_make_what_is_over_confident_any_better():
    rigid = {"pass_at_1": 0.3, "pass_at_8": 0.31, "chance_pass_at_1": 0.3, "token_entropy": 1.0}
    assert judge(rigid, BASE).level == "over-confident"
    assert judge({"pass_at_1": 0.5, "pass_at_8": 0.97, "chance_pass_at_1": 0.5}).level == "at risk"


def test_the_largest_k_is_judged():
    values = {"pass_at_1": 0.1, "pass_at_2": 0.1, "pass_at_16": 0.8, "pass_at_8": 0.1}
    assert judge(values).reasons[0].measure == "pass_at_16"
    assert judge({**values, "pass_at_16": math.nan}).reasons[0].measure == "pass_at_8"


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ({"zero_variance_fraction": 0.75}, "healthy"),
        ({"zero_variance_fraction": just(0.75, ABOVE)}, "at risk"),
        ({"zero_variance_fraction": 1.0, "pass_at_1": 0.5}, "at risk"),
        ({"zero_variance_fraction": 1.0, "pass_at_1": just(0.5, ABOVE)}, "healthy"),
        ({"zero_variance_fraction": 1.0, "pass_at_1": 0.0}, "cannot start"),
        ({"zero_variance_fraction": math.nan}, "unknown"),
    ],
)
def test_groups_without_a_signal_where_there_is_no_pass_at_k(values, level):
    assert judge(values).level == level


@pytest.mark.parametrize(
    ("entropy", "level"),
    [
        (0.0, "over-confident"),
        (just(0.05, BELOW), "over-confident"),
        (0.05, "at risk"),
        (just(0.3, BELOW), "at risk"),
        (0.3, "healthy"),
        (2.0, "healthy"),
        (math.nan, "cannot start"),
    ],
)
def test_token_entropy(entropy, level):
    assert level_of("token_entropy", {"token_entropy": entropy}) == level


def test_entropy_needs_the_bases():
    for base in (None, {}, {"token_entropy": 0.0}, {"token_entropy": math.nan}):
        assert judge({"token_entropy": 0.01, "token_nll": 1.0}, base) == Verdict("unknown", ())
    assert judge({}, BASE) == Verdict("unknown", ())


@pytest.mark.parametrize(
    ("nll", "level"),
    [
        (0.2, "healthy"),
        (0.6 - 2**-40, "healthy"),
        (0.6 + 2**-40, "at risk"),
        (1.2 - 2**-40, "at risk"),
        (1.2 + 2**-40, "over-confident"),
        (ABOVE, "over-confident"),
    ],
)
def test_calibration_on_held_out_demonstrations(nll, level):
    assert level_of("token_nll", {"token_entropy": 0.4, "token_nll": nll}) == level


def test_a_model_of_high_entropy_has_not_learned_the_demonstrations_and_is_not_over_confident():
    for entropy, judged in ((just(0.5, BELOW), True), (0.5, False)):
        reasons = judge({"token_entropy": entropy, "token_nll": 9.0}, BASE).reasons
        assert any(reason.measure == "token_nll" for reason in reasons) is judged


@pytest.mark.parametrize(
    ("probability", "level"),
    [
        (0.0, "cannot start"),
        (just(0.01, BELOW), "cannot start"),
        (0.01, "at risk"),
        (just(0.1, BELOW), "at risk"),
        (0.1, "healthy"),
        (1.0, "healthy"),
    ],
)
def test_format(probability, level):
    assert level_of("format_probability", {"format_probability": probability}) == level


ROLLOUTS = {
    None: {},
    "healthy": {"pass_at_1": 0.25, "pass_at_8": 0.75},
    "at risk": {"pass_at_1": 0.25, "pass_at_8": 0.4},
    "over-confident": {"pass_at_1": 0.25, "pass_at_8": 0.26},
    "cannot start": {"pass_at_1": 0.0, "pass_at_8": 0.0},
}
ENTROPY = {
    None: {},
    "healthy": {"token_entropy": 0.7},
    "at risk": {"token_entropy": 0.2},
    "over-confident": {"token_entropy": 0.04},
    "cannot start": {"token_entropy": math.nan},
}
FORMAT = {
    None: {},
    "healthy": {"format_probability": 0.9},
    "at risk": {"format_probability": 0.05},
    "cannot start": {"format_probability": 0.001},
}


def expected(rollouts, entropy, form):
    if entropy == "cannot start":
        return entropy
    if rollouts in ("at risk", "cannot start") and entropy == "over-confident":
        return "over-confident"
    if rollouts is not None:
        return rollouts
    if form == "cannot start":
        return form
    if entropy == "over-confident":
        return entropy
    if "at risk" in (entropy, form):
        return "at risk"
    return "healthy" if (entropy, form) == ("healthy", "healthy") else "unknown"


@pytest.mark.parametrize("levels", [*itertools.product(ROLLOUTS, ENTROPY, FORMAT)])
def test_every_combination(levels):
    """Rollouts come first, entropy alone never acquits, and the reason that decided stands first."""
    values = {**ROLLOUTS[levels[0]], **ENTROPY[levels[1]], **FORMAT[levels[2]]}
    found = judge(values, BASE)
    assert found.level == expected(*levels)
    names = ("pass_at_8", "token_entropy", "format_probability")
    given = {name: level for name, level in zip(names, levels, strict=True) if level is not None}
    assert {reason.measure: reason.level for reason in found.reasons} == given
    if found.level != "unknown":
        assert found.reasons[0].level == found.level
    if levels[0] == found.level and levels[1] != "cannot start":
        assert found.reasons[0].measure == "pass_at_8"


# Starts of RL on a real model, see NOTES in studies/verdicts.py: pass@1, pass@8, zero-variance groups, and on held-out
# demonstrations the entropy over the base's, over what they cost, and the format's probability.
STARTS = [
    ("V, moderate SFT", (0.26, 0.75, 0.25), (0.66, 0.83, 0.56), "healthy", "healthy"),
    ("V, excessive SFT", (0.08, 0.16, 0.91), (0.14, 0.11, 0.95), "over-confident", "over-confident"),
    ("V, fusion .5", (0.45, 0.84, 0.19), (0.41, 0.40, 0.36), "healthy", "at risk"),
    ("V, fusion .4", (0.21, 0.69, 0.31), (0.48, 0.39, 0.13), "healthy", "at risk"),
    (
        "V, fusion .28: the format is gone",
        (0.0, 0.0, 1.0),
        (0.67, 0.34, 0.003),
        "cannot start",
        "cannot start",
    ),
    ("V, base", (0.0, 0.0, 1.0), (1.0, 0.18, 0.0), "cannot start", "cannot start"),
    ("X, moderate SFT", (0.17, 0.56, 0.44), (0.157, 0.81, 0.66), "healthy", "at risk"),
    ("X, excessive SFT", (0.004, 0.03, 0.97), (0.037, 0.13, 0.96), "over-confident", "over-confident"),
    ("X, fusion .5", (0.10, 0.38, 0.63), (0.093, 0.44, 0.72), "healthy", "at risk"),
    ("X, fusion .3", (0.05, 0.28, 0.72), (0.235, 0.80, 0.17), "healthy", "at risk"),
    ("X, base", (0.0, 0.0, 1.0), (1.0, 0.86, 0.0), "cannot start", "cannot start"),
]


@pytest.mark.parametrize(("name", "rollouts", "demonstrations", "level", "without"), STARTS)
def test_the_starts_on_a_real_model(name, rollouts, demonstrations, level, without):
    one, eight, zero = rollouts
    ratio, calibration, form = demonstrations
    sampled = {"pass_at_1": one, "pass_at_8": eight, "zero_variance_fraction": zero}
    measured = {"token_entropy": ratio, "token_nll": ratio / calibration, "format_probability": form}
    assert judge({**sampled, **measured}, BASE).level == level, name
    assert judge(measured, BASE).level == without, name
    assert judge(sampled).level in (level, "at risk"), name


def test_a_format_that_was_not_measured_is_not_judged():
    assert judge({"format_probability": math.nan}) == Verdict("unknown", ())


def test_what_is_never_judged():
    dead = {"dormant_fraction": 1.0, "dormancy_score_low": 0.0, "relative_drift": 9.0, "effective_rank": 1.0}
    assert judge({**dead, "support_retention": -99.0}, {"effective_rank": 99.0}) == Verdict("unknown", ())
    healthy = {**ROLLOUTS["healthy"], **ENTROPY["healthy"]}
    assert judge({**healthy, **dead, "support_retention": -99.0}, BASE) == judge(healthy, BASE)


def test_advice():
    assert "start RL from this model" in judge(ROLLOUTS["healthy"]).advice
    assert "take harder" in judge(of_counts([8] * 16)).advice
    assert "take harder" in judge({"pass_at_1": 0.95, "zero_variance_fraction": 0.9}).advice
    assert "take harder" not in judge(of_counts([7] * 16)).advice
    diverged = judge({**ROLLOUTS["cannot start"], **FORMAT["healthy"], **ENTROPY["cannot start"]}, BASE)
    assert diverged.advice.startswith("It has diverged")
    assert "Rejuvenate it" in judge(ROLLOUTS["over-confident"]).advice
    assert "rollouts" in judge({}).advice
    none = ROLLOUTS["cannot start"]
    assert "more SFT, or start with easier prompts" in judge(none).advice
    assert judge({**none, **FORMAT["cannot start"]}).advice.startswith("The format is missing")
    assert judge({**none, **FORMAT["healthy"]}).advice.startswith("The format is there, the skill is missing")
    assert "more SFT, or start with easier prompts" in judge({**none, **FORMAT["at risk"]}).advice


def test_it_reads_as_sentences():
    values = {**ROLLOUTS["at risk"], "zero_variance_fraction": 0.8, "token_entropy": 0.012, "token_nll": 0.12}
    assert str(judge({**values, "format_probability": 0.5}, {"token_entropy": 0.3})).splitlines() == [
        "over-confident",
        "- token entropy 0.012 nats is 0.04 of the base's 0.300 (over-confident below 0.05, at risk below 0.3) "
        "[over-confident]",
        "- pass@8 is 0.40 beside a pass@1 of 0.25: repeated sampling gains 0.23 of what independent rollouts would "
        "(over-confident below 0.05, at risk below 0.6); 80% of the groups carry no learning signal [at risk]",
        "- held-out demonstrations cost 0.120 nats a token where the model expects 0.012, 0.10 of it "
        "(over-confident below 0.33, at risk below 0.67) [over-confident]",
        "- the format that the demonstrations share has a probability of 0.500 (cannot start below 0.01, at risk below "
        "0.1) [healthy]",
    ]
    none = judge({"pass_at_8": 0.0}).reasons[0].text
    assert none == "pass@8 is 0: no rollout is right, and RL has nothing to reward"
    assert judge(of_counts([0, 0])).reasons[0].text == f"{none}, but 2 prompts are too few to tell (8 tell)"
    assert "right rollouts to 1 of 16 prompts may be luck" in judge(of_counts([1] + [0] * 15)).reasons[0].text
    assert "few rollouts are right" in judge({"pass_at_1": 0.01, "pass_at_8": 0.048}).reasons[0].text
    assert (
        "nearly every prompt has a right rollout"
        in judge({"pass_at_1": 0.9, "pass_at_8": 0.95}).reasons[0].text
    )
    assert str(judge({})) == "unknown"
    assert str(Verdict("healthy", (Reason("a", "healthy", "b"),))) == "healthy\n- b [healthy]"
