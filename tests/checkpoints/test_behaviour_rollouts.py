"""A few rollouts: which prompts, how many, and what they come to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_rejuv.calibration.batches import IGNORED
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.checkpoints.behaviour import GROUP, OTHERS, PROMPTS, Rollouts, TextJudge, sample_rollouts
from lightning_rejuv.progress import reporting
from tests.conftest import tiny_llama


def text(ids):
    """Ids as numbers."""
    return " ".join(map(str, ids))


def rollouts_of(model, batches, verifier):
    """Sample some, with the text of each prompt by its tokens, as it is read from a file."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: text(ids.tolist()))
    rows = [row for batch in batches for row in zip(batch.inputs["input_ids"], batch.response, strict=True)]
    prompts = [tuple(ids[: int(response.int().argmax()) + 1].tolist()) for ids, response in rows]
    return sample_rollouts(model, batches, TextJudge(verifier, {p: text(p) for p in prompts}, tokenizer))


@pytest.fixture
def model():
    return tiny_llama().eval()


def calibration(model, count):
    """So many different prompts of two lengths, each with a response of two tokens; the last is there twice."""
    rows = []
    for number in [*range(count), count - 1]:
        prompt = [1 + number % 20, 1 + number // 20, 5, 6][: 3 + number % 2]
        ids = torch.tensor([[*prompt, 3, 4]])
        labels = ids.clone()
        labels[0, : len(prompt)] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    return batches_for(model, rows)


@pytest.mark.parametrize("count", [1, 3, PROMPTS, 41])
def test_groups_of_eight_to_different_prompts_all_over_the_data(model, count):
    seen = []

    def verifier(prompt, response):
        seen.append((prompt, response))
        return False

    told = []
    with reporting(lambda *step: told.append(step)):
        found = rollouts_of(model, calibration(model, count), verifier)
    prompts = min(count, PROMPTS)
    assert (found.prompts, found.group) == (prompts, GROUP)
    own, others = seen[: prompts * GROUP], seen[prompts * GROUP :]
    asked = [prompt for prompt, _ in own]
    assert sorted(map(asked.count, set(asked))) == [GROUP] * prompts
    if count == 41:
        numbers = sorted(int(p.split()[0]) - 1 + 20 * (int(p.split()[1]) - 1) for p in set(asked))
        assert numbers == [number * 41 // PROMPTS for number in range(PROMPTS)]
    assert len(others) == min(OTHERS, prompts - 1) * len(own)
    assert sorted(response for _, response in others) == sorted(
        [response for _, response in own] * min(OTHERS, prompts - 1)
    )
    assert (found.pass_at_1, found.pass_at_8, found.zero_variance_fraction) == (0.0, 0.0, 1.0)
    assert found.chance_pass_at_1 == (0.0 if prompts > 1 else None)
    steps = [step for step in told if step[0] == "checking responses"]
    assert steps == [("checking responses", done, len(seen)) for done in range(len(seen) + 1)]


def test_what_they_come_to(model):
    """All right to one prompt, half of them to one, none to two."""

    def verifier():
        counts = {}

        def verify(prompt, response):
            counts[prompt] = counts.get(prompt, 0) + 1
            kind = int(prompt.split()[0]) - 1
            return kind == 0 or (kind == 1 and counts[prompt] <= GROUP and counts[prompt] % 2 == 1)

        return verify

    found = rollouts_of(model, calibration(model, 4), verifier())
    assert found.measures == {
        "pass_at_1": 0.375,
        "pass_at_8": 0.5,
        "zero_variance_fraction": 0.75,
        "chance_pass_at_1": 0.25,  # what is right for the first prompt, whoever answers it
        "rollout_groups": 4.0,
    }
    assert found == rollouts_of(model, calibration(model, 4), verifier())


def test_chance_is_of_the_same_responses_to_other_prompts(model):
    """What is right for every prompt is a guess; what is right for its own alone is none."""
    anything = rollouts_of(model, calibration(model, 5), lambda prompt, response: True)
    assert (anything.pass_at_1, anything.chance_pass_at_1) == (1.0, 1.0)
    own = {}

    def only_own(prompt, response):
        if len(own.setdefault(prompt, [])) < GROUP:
            own[prompt].append(response)
            return True
        return False

    found = rollouts_of(model, calibration(model, 5), only_own)
    assert (found.pass_at_1, found.chance_pass_at_1) == (1.0, 0.0)


def test_chance_is_not_measured_with_one_prompt(model):
    found = rollouts_of(model, calibration(model, 1), lambda prompt, response: True)
    assert found.chance_pass_at_1 is None
    assert found.measures == {
        "pass_at_1": 1.0,
        "pass_at_8": 1.0,
        "zero_variance_fraction": 1.0,
        "rollout_groups": 1.0,
    }


def test_those_that_did_not_end_are_counted(model):
    """By their last token; all of them if the model names no token to end on."""
    responses = []

    def verifier(prompt, response):
        responses.append(response.split())
        return False

    model.generation_config.eos_token_id = [5, 6, 7, 8]
    found = rollouts_of(model, calibration(model, 3), verifier)
    cut = [one for one in responses[: 3 * GROUP] if one[-1] not in ("5", "6", "7", "8")]
    assert {len(one) for one in cut} == {8}  # four times as long as the calibration's
    assert found.unfinished == len(cut) > 0
    model.generation_config.eos_token_id = list(range(23))
    assert rollouts_of(model, calibration(model, 3), verifier).unfinished == 0
    model.generation_config.eos_token_id = None
    assert rollouts_of(model, calibration(model, 3), verifier).unfinished == 3 * GROUP


def test_they_are_doubted_where_more_than_half_of_them_did_not_end():
    for unfinished in (0, 1, 12):
        assert Rollouts(3, 8, 0.0, 0.0, 1.0, unfinished=unfinished).doubts == ()
    (doubt,) = Rollouts(3, 8, 0.0, 0.0, 1.0, unfinished=13).doubts
    assert doubt.startswith("13 of the 24 rollouts did not end: their beginnings were judged.")
    assert "`eos_token_id` in generation_config.json" in doubt


@pytest.mark.parametrize(
    ("verifier", "error", "message"),
    [
        (
            lambda prompt, response: -1.0,
            ValueError,
            r"but got -1.0 \(float\) on prompt '1 1 5' and response '",
        ),
        (
            lambda prompt, response: None,
            ValueError,
            r"but got None \(NoneType\) on prompt '1 1 5' and response '",
        ),
        (
            lambda prompt, response: {}[prompt],
            RuntimeError,
            "raised KeyError on prompt '1 1 5' and response '",
        ),
    ],
)
def test_what_is_no_answer_names_prompt_and_response(model, verifier, error, message):
    """In rollouts of the SFT model, and of a fusion by the same judge."""
    batches = calibration(model, 2)
    with pytest.raises(error, match=message):
        rollouts_of(model, batches, verifier)
    sample = {"input_ids": torch.tensor([[1, 1, 5, 3]]), "labels": torch.tensor([[IGNORED] * 3 + [3]])}
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: text(ids.tolist()))
    with pytest.raises(error, match=message):
        TextJudge(verifier, {(1, 1, 5): "1 1 5"}, tokenizer)(sample, "sampled batch 0")
