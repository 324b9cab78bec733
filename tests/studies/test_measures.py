from __future__ import annotations

import pytest
import torch

from examples.sft_to_rl.grpo import GRPO
from examples.sft_to_rl.model import build_model, save_model
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import get_task
from studies.measures import Measures, rounded, sampled_batch, verify

SETTINGS = Settings(held_out=8, responses=24)
TASK = get_task("running_total")


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    base = save_model(build_model(len(TASK.vocabulary), 901), tmp_path_factory.mktemp("base") / "base")
    return Measures(base, TASK, SETTINGS, 901)


def test_the_samples_are_those_of_the_examples_grpo(measures):
    base = build_model(len(TASK.vocabulary), 901)
    [wanted] = GRPO(base, TASK, SETTINGS, 901).sample_responses(base)
    batch = sampled_batch(measures.support.rollouts)
    assert all(torch.equal(batch[key], wanted[key]) for key in ("input_ids", "labels"))
    assert verify(batch).tolist() == (measures.support.rollouts.solved > 0).tolist()


def test_support_by_brute_force(measures):
    other, base = (build_model(len(TASK.vocabulary), seed) for seed in (902, 901))
    rollouts = measures.support.rollouts
    rollouts.solved = (torch.arange(24) % 3 == 0).float()
    excess = []
    with torch.no_grad():
        for row in range(24):
            sequence = torch.cat([rollouts.prompts[row], rollouts.tokens[row]])
            total = 0.0
            for position in range(len(rollouts.prompts[row]), len(sequence)):
                if rollouts.agent_mask[row, position - len(rollouts.prompts[row])]:
                    logits = [m(sequence[None, :position]).logits[0, -1].double() for m in (other, base)]
                    ours, bases = (x.log_softmax(0)[sequence[position]] for x in logits)
                    total += float(ours - bases)
            excess.append(total)
    values = measures.of(other)
    assert values["support"] == pytest.approx(sum(excess) / 24, abs=2e-5)
    assert values["verified_support"] == pytest.approx(sum(excess[::3]) / 8, abs=2e-5)
    assert abs(values["support"]) > 0.1
    assert values["support"] != pytest.approx(values["verified_support"], abs=1e-3)


def test_the_base_has_lost_nothing_and_nothing_verified_is_none(measures):
    measures.support.rollouts.solved = torch.zeros(24)
    values = measures.of(build_model(len(TASK.vocabulary), 901))
    assert values["support"] == pytest.approx(0, abs=1e-6)
    assert values["verified_support"] is None
    assert values["relative_drift"] == 0
    assert values["token_entropy"] > 0
    assert measures.support.summary()["solved"] == 0


def test_values_for_json():
    values = {"a": 1.23456789, "b": float("nan"), "c": None, "d": float("inf")}
    assert dict(rounded(values)) == {"a": 1.23457, "b": None, "c": None, "d": None}
