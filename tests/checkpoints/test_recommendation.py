"""What a diagnosis recommends: never against its own search, never without data, never twice."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lightning_rejuv.alpha.search import AlphaPoint, AlphaSearch, with_rollouts
from lightning_rejuv.checkpoints.behaviour import Behaviour, Rollouts
from lightning_rejuv.checkpoints.diagnosis import Diagnosis
from lightning_rejuv.checkpoints.recommendation import recommend, verdict_on
from lightning_rejuv.checkpoints.record import Record
from lightning_rejuv.verdict import judge

ROLLOUTS = {
    "healthy": Rollouts(16, 8, 0.3, 0.8, 0.2),
    "at risk": Rollouts(16, 8, 0.3, 0.4, 0.7),
    "over-confident": Rollouts(16, 8, 0.3, 0.31, 0.95),
    "cannot start": Rollouts(16, 8, 0.0, 0.0, 1.0),
}


def behaviour(
    rollouts=None, alpha=0.5, entropy=(0.7, 1.0), nll=0.7, form=0.9, doubts=(), retention=-1.0
):  # fmt: skip
    curve = [AlphaPoint(0.0, 9.0, 5.0, 0.1), AlphaPoint(1.0, 4.0, 5.0 - retention, 1.0)]
    search = AlphaSearch("auto", alpha, 0.45, 0.8, 0.7, curve, responses=3, doubts=doubts)
    return Behaviour(3, *entropy, nll, form, retention, search, rollouts)


def test_the_verdict_is_that_of_the_monitor():
    for rollouts in (None, *ROLLOUTS.values()):
        for entropy, nll, form in ((0.04, 0.3, 0.9), (0.4, 2.0, 0.9), (0.7, 0.7, 0.9), (0.7, 0.7, 0.001)):
            values = {"token_entropy": entropy, "token_nll": nll, "format_probability": form}
            if rollouts is not None:
                values |= {
                    "pass_at_1": rollouts.pass_at_1,
                    "pass_at_8": rollouts.pass_at_8,
                    "zero_variance_fraction": rollouts.zero_variance_fraction,
                    "chance_pass_at_1": 0.0,
                }
            found = verdict_on(behaviour(rollouts, entropy=(entropy, 1.0), nll=nll, form=form))
            assert found == judge(values, {"token_entropy": 1.0})
    assert verdict_on(None).level == "unknown"


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.997, 1.0])
@pytest.mark.parametrize("level", ROLLOUTS)
def test_what_is_recommended_is_what_the_search_found(level, alpha):
    measured = behaviour(ROLLOUTS[level], alpha, doubts=("The window is narrow.", "It was cut."))
    verdict = verdict_on(measured)
    assert verdict.level == level
    text, recommended = recommend(verdict, measured, None, unchanged=False)
    if level == "healthy":
        assert "nothing to do" in text
        assert recommended == (1.0 if alpha == 1.0 else None)
    elif level == "cannot start":
        assert text.startswith(verdict.advice)
        assert "Fusion with the base would not bring it" in text
        assert recommended is None
    else:
        assert text.endswith(" The window is narrow. It was cut.")
        assert recommended == alpha
        assert ("nothing to fuse" if alpha == 1.0 else f"with alpha {alpha:.3f}") in text
        assert text.startswith("Compare more rollouts") == (level == "at risk" and alpha != 1.0)


def test_a_search_without_doubts_is_recommended_without():
    measured = behaviour(ROLLOUTS["over-confident"])
    text, _ = recommend(verdict_on(measured), measured, None, unchanged=False)
    assert text == "Rejuvenate with alpha 0.500, which the search found (`--alpha auto`)."


def test_an_alpha_that_was_raised_is_recommended_as_a_number():
    """The command's own search has no verifier, and would write another one."""
    measured = behaviour(ROLLOUTS["over-confident"], alpha=0.4)
    search = with_rollouts(measured.search, lambda alpha: (int(alpha > 0.45), 32))
    measured = dataclasses.replace(measured, search=search)
    text, recommended = recommend(verdict_on(measured), measured, None, unchanged=False)
    assert recommended == 0.5
    assert text.startswith(
        "Rejuvenate with `--alpha 0.5`: `--alpha auto`, which checks no rollouts, would take 0.4. "
    )
    assert text.endswith(search.doubts[-1])


@pytest.mark.parametrize(("responses", "alpha"), [(31, 0.5), (32, None)])
def test_no_alpha_is_recommended_where_no_rollout_was_right_at_any(responses, alpha):
    measured = behaviour(ROLLOUTS["over-confident"])
    search = with_rollouts(measured.search, lambda alpha: (0, responses))
    measured = dataclasses.replace(measured, search=search)
    text, recommended = recommend(verdict_on(measured), measured, None, unchanged=False)
    assert recommended == alpha
    assert text.startswith(
        "Rejuvenate with" if alpha else "No alpha is recommended: take an earlier checkpoint."
    )
    assert text.endswith(measured.search.doubts[-1])


@pytest.mark.parametrize("level", ROLLOUTS)
def test_where_the_search_came_to_no_alpha_the_rest_is_told(level):
    """A verdict stays a verdict, and what is recommended is no alpha, with the reason."""
    measured = dataclasses.replace(
        behaviour(ROLLOUTS[level]), search=None, no_alpha="The search comes to none."
    )
    verdict = verdict_on(measured)
    assert verdict == verdict_on(behaviour(ROLLOUTS[level]))
    text, alpha = recommend(verdict, measured, None, unchanged=False)
    assert alpha is None
    if level in ("at risk", "over-confident"):
        assert text == "No alpha is recommended: take an earlier checkpoint. The search comes to none."
    if level == "healthy":  # base and SFT model may be swapped
        assert text.startswith("There is nothing to do")
        assert text.endswith(" The search comes to none.")
    found = Diagnosis("b", "s", {}, (), measured, verdict.level, verdict.reasons, text, alpha)
    shown = str(found)
    assert "alpha found        none\n" in shown
    assert shown.count("The search comes to none.") == 1
    assert "support retention  -1.00 nats" in shown
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))["behaviour"]
    assert (plain["search"], plain["no_alpha"]) == (None, "The search comes to none.")
    assert plain["doubts"] == ["The search comes to none."]


@pytest.mark.parametrize("level", ROLLOUTS)
@pytest.mark.parametrize("unfinished", [64, 65, 128])
def test_rollouts_that_did_not_end_are_told_and_doubted_once(level, unfinished):
    rollouts = dataclasses.replace(ROLLOUTS[level], unfinished=unfinished)
    measured = behaviour(rollouts, doubts=("It was cut.",))
    verdict = verdict_on(measured)
    text, alpha = recommend(verdict, measured, None, unchanged=False)
    found = Diagnosis("b", "s", {}, (), measured, verdict.level, verdict.reasons, text, alpha)
    assert f"all right or all wrong, {unfinished} of the rollouts unfinished\n" in str(found)
    assert str(found).count("their beginnings were judged") == (unfinished != 64)
    plain = found.to_dict()["behaviour"]
    assert plain["rollouts"]["unfinished"] == unfinished
    assert plain["doubts"] == ["It was cut.", *rollouts.doubts]


def test_what_cannot_start_is_told_what_is_missing():
    for form, missing in ((0.001, "format is missing"), (0.9, "skill is missing")):
        measured = behaviour(ROLLOUTS["cannot start"], form=form)
        assert missing in recommend(verdict_on(measured), measured, None, unchanged=False)[0]


def test_where_the_measures_do_not_tell_rollouts_are_asked_for():
    measured = behaviour(entropy=(0.0, 0.0))
    text, alpha = recommend(verdict_on(measured), measured, None, unchanged=False)
    assert alpha is None
    assert "`--verifier`" in text


def test_without_calibration_data_nothing_is_recommended():
    for unchanged in (False, True):
        text, alpha = recommend(verdict_on(None), None, None, unchanged)
        assert alpha is None
        assert ("nothing to rejuvenate" if unchanged else "--calibration") in text


def test_a_base_that_lacks_the_format_is_sent_to_sft():
    measured = behaviour(entropy=(1.0, 1.0), form=0.0)
    text, alpha = recommend(verdict_on(measured), measured, None, unchanged=True)
    assert alpha is None
    assert "nothing to rejuvenate" in text
    assert "do more SFT" in text


@pytest.mark.parametrize("level", ["unknown", *ROLLOUTS])
def test_a_second_rejuvenation_is_never_recommended(level):
    measured = behaviour(ROLLOUTS[level], 0.3) if level in ROLLOUTS else None
    text, alpha = recommend(verdict_on(measured), measured, Record(0.4, 3, "sft", "base"), unchanged=False)
    assert alpha is None
    assert text.startswith("It is rejuvenated already")
    assert ("with a smaller alpha" in text) == (level in ("at risk", "over-confident"))
    assert ("with a larger alpha" in text) == (level == "cannot start")
    assert ("start RL from it" in text) == (level in ("healthy", "at risk"))
    assert ("do not rejuvenate it a second time" in text) == (level in ("unknown", "healthy", "at risk"))


@pytest.mark.parametrize(
    ("alpha", "level", "advice"),
    [
        (1.0, "cannot start", "do more SFT"),  # a refit alone
        ({"*.mlp.*": 1.0, "*": 0.5}, "cannot start", "with a larger alpha"),
        (0.0, "over-confident", "take another base, or an earlier checkpoint"),
        ({"*.mlp.*": 0.0, "*": 0.5}, "over-confident", "with a smaller alpha, or an earlier checkpoint"),
    ],
)
def test_no_alpha_beyond_the_line_is_advised(alpha, level, advice):
    measured = behaviour(ROLLOUTS[level], 0.3)
    text, _ = recommend(verdict_on(measured), measured, Record(alpha, 3, "sft", "base"), unchanged=False)
    assert advice in text


@pytest.mark.parametrize("record", [None, Record(0.4, 3, "sft", "base")])
def test_a_model_that_has_diverged_is_sent_neither_to_sft_nor_to_another_alpha(record):
    measured = behaviour(ROLLOUTS["cannot start"], entropy=(math.nan, 1.0), form=0.9)
    text, alpha = recommend(verdict_on(measured), measured, record, unchanged=False)
    assert alpha is None
    assert "It has diverged: take an earlier checkpoint" in text
    assert "do more SFT" not in text
    assert "Fusion" not in text


@pytest.mark.parametrize("record", [None, Record(0.4, 3, "sft", "base")])
def test_what_is_solved_needs_harder_prompts(record):
    measured = behaviour(Rollouts(16, 8, 0.99, 1.0, 0.95), 0.3)
    text, _ = recommend(verdict_on(measured), measured, record, unchanged=False)
    assert "take harder ones" in text
