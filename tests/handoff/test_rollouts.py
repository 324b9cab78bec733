"""A few rollouts: which prompts, how many, and what they come to."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.calibration import IGNORED
from lightning_rejuv.calibration_checks import batches_for
from lightning_rejuv.handoff.rollouts import GROUP, PROMPTS, sample_rollouts
from tests.conftest import tiny_llama


@pytest.fixture
def model():
    return tiny_llama().eval()


def calibration(model, count, length=3):
    """So many different prompts of two lengths, each with a response of two tokens; the last is there twice."""
    rows = []
    for number in [*range(count), count - 1]:
        prompt = [1 + number % 20, 1 + number // 20, 5, 6][: length + number % 2]
        ids = torch.tensor([[*prompt, 3, 4]])
        labels = ids.clone()
        labels[0, : len(prompt)] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    return batches_for(model, rows)


def prompts_of(sample):
    starts = (sample["labels"] != IGNORED).int().argmax(1).tolist()
    return [tuple(ids[:start].tolist()) for ids, start in zip(sample["input_ids"], starts, strict=True)]


@pytest.mark.parametrize("count", [1, 5, PROMPTS, 41])
def test_groups_of_eight_to_different_prompts_all_over_the_data(model, count):
    seen = []

    def verifier(sample):
        seen.extend(prompts_of(sample))
        return torch.zeros(len(sample["input_ids"]), dtype=torch.bool)

    found = sample_rollouts(model, calibration(model, count), verifier)
    prompts = min(count, PROMPTS)
    assert (found.prompts, found.group) == (prompts, GROUP)
    assert sorted(map(seen.count, set(seen))) == [GROUP] * prompts
    if count == 41:
        numbers = sorted(p[0] - 1 + 20 * (p[1] - 1) for p in set(seen))
        assert numbers == [number * 41 // PROMPTS for number in range(PROMPTS)]
    assert (found.pass_at_1, found.pass_at_8, found.zero_variance_fraction) == (0.0, 0.0, 1.0)


def test_what_they_come_to(model):
    """All right to one prompt, half of them to one, none to two."""
    counts = {}

    def verifier(sample):
        right = []
        for prompt in prompts_of(sample):
            counts[prompt] = counts.get(prompt, 0) + 1
            kind = prompt[0] - 1
            right.append(kind == 0 or (kind == 1 and counts[prompt] % 2 == 1))
        return torch.tensor(right)

    found = sample_rollouts(model, calibration(model, 4), verifier)
    assert found.measures == {"pass_at_1": 0.375, "pass_at_8": 0.5, "zero_variance_fraction": 0.75}
    assert found.measures == sample_rollouts(model, calibration(model, 4), verifier).measures
