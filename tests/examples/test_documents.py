from __future__ import annotations

import doctest

import pytest
import torch

from examples.sft_to_rl import seeds
from examples.sft_to_rl.tasks import TASKS, documents, get_task


@pytest.mark.parametrize("module", [documents, seeds])
def test_doctests(module):
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_transcript_closes_gaps_and_labels_only_the_agent():
    transcript = documents.Transcript(3)
    transcript.environment(torch.tensor([[2, 3], [4, 5], [6, 7]]))
    transcript.agent(torch.tensor([8, 9, 10]), keep=torch.tensor([True, False, True]))
    transcript.environment(11, keep=torch.tensor([False, False, True]))
    transcript.agent(12)
    batch = transcript.batch()
    assert batch["input_ids"].tolist() == [[2, 3, 8, 12, 0], [4, 5, 12, 0, 0], [6, 7, 10, 11, 12]]
    assert batch["labels"].tolist() == [
        [-100, -100, 8, 12, -100],
        [-100, -100, 12, -100, -100],
        [-100, -100, 10, -100, 12],
    ]


def test_concatenate_pads_tokens_and_labels_differently():
    short = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, 6]])}
    long = {"input_ids": torch.tensor([[7, 8, 9]]), "labels": torch.tensor([[7, 8, 9]])}
    joined = documents.concatenate([short, long])
    assert joined["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert joined["labels"].tolist() == [[-100, 6, -100], [7, 8, 9]]


def test_streams_of_different_purpose_or_seed_differ():
    draws = [
        torch.rand(8, generator=seeds.generator(seed, purpose)).tolist()
        for seed, purpose in [(1, "a"), (2, "a"), (1, "b")]
    ]
    assert draws[0] != draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("name", TASKS)
def test_documents_are_a_function_of_the_generator(name):
    task = get_task(name)
    for make in (
        lambda generator: task.pretraining_documents(generator, 32, warm_up=False),
        lambda generator: task.demonstrations(generator, 32),
    ):
        first, second = make(seeds.generator(901, "x")), make(seeds.generator(901, "x"))
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(first["labels"], second["labels"])
        labelled = first["labels"] != -100
        assert torch.equal(first["labels"][labelled], first["input_ids"][labelled])
        assert int(first["input_ids"].max()) < len(task.vocabulary)


def test_unknown_task():
    with pytest.raises(ValueError, match=r"Expected `task` to be one of .*retail_desk.* but got 'chess'"):
        get_task("chess")
