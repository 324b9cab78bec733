"""A few rollouts: which prompts, how many, and what they come to."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.calibration import IGNORED
from lightning_rejuv.calibration_checks import batches_for
from lightning_rejuv.handoff.rollouts import GROUP, OTHERS, PROMPTS, sample_rollouts
from tests.conftest import tiny_llama


class Tokenizer:
    """Writes ids as numbers."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids.tolist()))


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

    found = sample_rollouts(model, calibration(model, count), verifier, Tokenizer())
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
    assert found.chance_pass_at_1 == 0.0


def test_what_they_come_to(model):
    """All right to one prompt, half of them to one, none to two."""

    def verifier():
        counts = {}

        def verify(prompt, response):
            counts[prompt] = counts.get(prompt, 0) + 1
            kind = int(prompt.split()[0]) - 1
            return kind == 0 or (kind == 1 and counts[prompt] <= GROUP and counts[prompt] % 2 == 1)

        return verify

    found = sample_rollouts(model, calibration(model, 4), verifier(), Tokenizer())
    assert found.measures == {
        "pass_at_1": 0.375,
        "pass_at_8": 0.5,
        "zero_variance_fraction": 0.75,
        "chance_pass_at_1": 0.25,  # what is right for the first prompt, whoever answers it
    }
    assert found == sample_rollouts(model, calibration(model, 4), verifier(), Tokenizer())


def test_chance_is_of_the_same_responses_to_other_prompts(model):
    """What is right for every prompt is a guess; what is right for its own alone is none."""
    anything = sample_rollouts(model, calibration(model, 5), lambda prompt, response: True, Tokenizer())
    assert (anything.pass_at_1, anything.chance_pass_at_1) == (1.0, 1.0)
    own = {}

    def only_own(prompt, response):
        if len(own.setdefault(prompt, [])) < GROUP:
            own[prompt].append(response)
            return True
        return False

    found = sample_rollouts(model, calibration(model, 5), only_own, Tokenizer())
    assert (found.pass_at_1, found.chance_pass_at_1) == (1.0, 0.0)
    assert sample_rollouts(model, calibration(model, 1), only_own, Tokenizer()).chance_pass_at_1 == 0.0
