from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.sft_to_rl.model import build_model
from examples.sft_to_rl.tasks import get_task
from studies.knowledge import knowledge

TASK = get_task("price_desk", 901)


class Oracle(nn.Module):
    """Gives the right answer a probability of its own for each prompt, and the rest to one other token."""

    device = torch.device("cpu")

    def __init__(self, task, probability_of):
        super().__init__()
        self.answers = {
            tuple(prompt.tolist()): (int(answer), probability_of(kind, row))
            for kind, questions in task.questions().items()
            for row, (prompt, answer) in enumerate(zip(questions.prompts, questions.answers, strict=True))
        }
        self.size = len(task.vocabulary)

    def forward(self, input_ids, use_cache):
        probabilities = torch.zeros(*input_ids.shape, self.size)
        for row, prompt in enumerate(input_ids):
            answer, probability = self.answers[tuple(prompt.tolist())]
            probabilities[row, -1, answer] = probability
            probabilities[row, -1, 0] = 1 - probability
        return type("Output", (), {"logits": probabilities.log()})()


def test_shares_and_probabilities_of_a_model_that_knows_some():
    """Of the asked prices every third is known with .9, of the others with .2; all others are not known."""
    model = Oracle(TASK, lambda kind, row: (0.9 if row % 3 == 0 else 0.2) if kind == "asked" else 0.1)
    known = knowledge(model, TASK)
    assert known["asked"] == {
        "right": pytest.approx(1 / 3, abs=1e-5),
        "probability": pytest.approx(1.3 / 3, abs=1e-5),
    }
    assert known["unasked"] == known["known"] == {"right": 0.0, "probability": pytest.approx(0.1, abs=1e-5)}


def test_an_untrained_model_knows_nothing():
    known = knowledge(build_model(len(TASK.vocabulary), 1), TASK)
    assert set(known) == {"asked", "unasked", "known"}
    assert all(kind["probability"] < 0.01 for kind in known.values())


@pytest.mark.parametrize("name", ["retail_desk", "running_total"])
def test_tasks_without_facts_have_no_questions(name):
    task = get_task(name)
    assert knowledge(build_model(len(task.vocabulary), 1), task) == {}
