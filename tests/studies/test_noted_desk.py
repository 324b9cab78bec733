from __future__ import annotations

import pytest
import torch

from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks import RetailDesk
from examples.sft_to_rl.tasks.documents import IGNORE
from examples.sft_to_rl.tasks.retail_desk import VOCABULARY, Episodes
from studies.noted_desk import NotedDesk
from tests.examples.reference_desk import drive

TASK = NotedDesk(note=3)


def one_episode() -> Episodes:
    """Two requests: b holds 4 (claimed 9), add 2; e holds 1 (claimed 1), subtract 3."""
    return Episodes(*(torch.tensor([x]) for x in ([1, 4], [4, 1], [9, 1], [2, -3])))


def test_the_user_says_goodbye_when_the_note_is_written():
    played = drive(TASK.environment(one_episode()), ["?b!b6?e!e8907#@&."])[0]
    assert played.transcript == "?b4!b6ke1-3=?e1!e8k907$#@&."
    assert played.mask == "AAeAAAeeeeeeAAeAAAeAAAeAAAA"
    assert played.reward == 1.0


@pytest.mark.parametrize(
    ("script", "reward"),
    [
        ("!b6!e8000#@&.", 1.0),
        ("!b6!e800#@&.", 0.0),  # a note that is too short
        ("!b6!e8?e00#@&.", 0.0),  # a command within it
        ("!b6!e80000#@&.", 0.0),  # a digit after the goodbye
        ("!b6000!e8000#@&.", 0.0),  # a note too early
        ("!b6!e8000#@.", 0.0),
        ("!b6!e7000#@&.", 0.0),
    ],
)
def test_reward(script, reward):
    assert drive(TASK.environment(one_episode()), [script])[0].reward == reward


@pytest.mark.parametrize("kind", ["demonstrations", "pretraining_documents"])
def test_documents_are_the_retail_desks_with_a_note_of_the_agents(kind):
    arguments = (False,) if kind == "pretraining_documents" else ()
    plain, noted = (
        getattr(task, kind)(generator(901, "documents"), 500, *arguments) for task in (RetailDesk(), TASK)
    )
    zeros = []
    for row in range(500):
        ids, labels = noted["input_ids"][row], noted["labels"][row]
        at = int((ids == VOCABULARY["$"]).nonzero())
        note = VOCABULARY.decode(ids[at - 3 : at])
        assert note.isdigit()
        assert torch.equal(labels[at - 3 : at], ids[at - 3 : at])
        assert labels[at] == IGNORE
        for key, whole in (("input_ids", ids), ("labels", labels)):
            assert torch.equal(torch.cat([whole[: at - 3], whole[at:]]), plain[key][row])
        zeros.append(note.count("0") / 3)
    share = sum(zeros) / 500
    assert share == 1 if kind == "demonstrations" else share == pytest.approx(0.55, abs=0.05)


def test_a_demonstration_earns_the_reward_with_its_note():
    batch = TASK.demonstrations(generator(901, "demonstrations"), 1)
    text = VOCABULARY.decode(batch["input_ids"][0])
    keys, claims = ([text[i] for i in at] for at in ((0, 9), (1, 10)))
    changes = [int(text[2:4]), int(text[11:13])]
    episode = Episodes(
        torch.tensor([["abcdef".index(k) for k in keys]]),
        *[torch.tensor([[int(c) for c in claims]])] * 2,
        torch.tensor([changes]),
    )
    agent = VOCABULARY.decode(batch["input_ids"][0][batch["labels"][0] != IGNORE])
    assert drive(TASK.environment(episode), [agent])[0].reward == 1.0
    assert TASK.name == "noted_desk_3"
