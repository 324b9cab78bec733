from __future__ import annotations

import random

import pytest
import torch

from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks.retail_desk import (
    VOCABULARY,
    Episodes,
    RetailDesk,
    draw_episodes,
)
from tests.examples.reference_desk import drive, play

TASK = RetailDesk()


def episode_of(episodes: Episodes, row: int) -> tuple[str, str, str, list[int]]:
    keys = "".join("abcdef"[k] for k in episodes.keys[row])
    values, claims = (
        "".join(str(int(x)) for x in field[row]) for field in (episodes.values, episodes.claims)
    )
    return keys, values, claims, episodes.changes[row].tolist()


def perfect(keys: str, values: str, claims: str, changes: list[int]) -> str:
    """What an agent writes that reads before every write."""
    writes = [f"?{k}!{k}{(int(v) + d) % 10}" for k, v, d in zip(keys, values, changes, strict=True)]
    return "".join(writes) + "#@&."


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_environment_equals_a_plain_simulation(turns):
    """Perfect scripts with random corruptions, and noise: transcript, mask, outcome and reads agree."""
    rng = random.Random(turns)
    episodes = draw_episodes(generator(901, "test"), 600, turns, honest=0.5)
    scripts = []
    for row in range(len(episodes)):
        symbols = list(perfect(*episode_of(episodes, row)))
        for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
            position = rng.randrange(len(symbols))
            change = rng.choice(["replace", "drop", "insert", "repeat"])
            symbol = rng.choice(VOCABULARY.symbols)
            if change == "replace":
                symbols[position] = symbol
            elif change == "drop" and len(symbols) > 1:
                del symbols[position]
            elif change == "insert":
                symbols.insert(position, symbol)
            else:
                symbols[position:position] = symbols[max(0, position - 2) : position]
        scripts.append("".join(symbols) + ".")
    played = drive(TASK.environment(episodes), scripts)
    wanted = [play(*episode_of(episodes, row), script) for row, script in enumerate(scripts)]
    assert played == wanted
    rewards = [reference.reward for reference in wanted]
    assert 0.2 < sum(rewards) / len(rewards) < 0.9  # both outcomes are well represented


def one_episode() -> Episodes:
    """Two requests: b holds 4 (claimed 9), add 2; e holds 1 (claimed 1), subtract 3."""
    return Episodes(
        torch.tensor([[1, 4]]), torch.tensor([[4, 1]]), torch.tensor([[9, 1]]), torch.tensor([[2, -3]])
    )


def reward_of(script: str) -> float:
    return drive(TASK.environment(one_episode()), [script])[0].reward


def test_prompt_and_replies():
    environment = TASK.environment(one_episode())
    assert VOCABULARY.decode(environment.prompts[0]) == "b9+2="
    played = drive(environment, ["?b!b6?e!e8#@&."])[0]
    assert played.transcript == "?b4!b6ke1-3=?e1!e8k$#@&."
    assert played.mask == "AAeAAAeeeeeeAAeAAAeeAAAA"
    assert played.reward == 1.0


@pytest.mark.parametrize("script", ["?b!b6?e!e8#@&.", "!b6!e8#@&.", "?b?b!b6?e?e!e8#@&.", "!b6!e8?a#@&."])
def test_right_work_is_rewarded_however_it_is_done(script):
    assert reward_of(script) == 1.0


@pytest.mark.parametrize(
    ("mistake", "script"),
    [
        ("trusts a wrong claim", "!b1!e8#@&."),
        ("writes a wrong value", "!b6!e7#@&."),
        ("writes to a wrong record", "!b6!a8#@&."),
        ("no form", "!b6!e8."),
        ("form incomplete", "!b6!e8#@."),
        ("form in the wrong order", "!b6!e8@#&."),
        ("form doubled", "!b6!e8#@&#@&."),
        ("field doubled", "!b6!e8##@&."),
        ("form before the goodbye", "!b6#@&!e8."),
        ("form before and after", "!b6#@&!e8#@&."),
        ("ends after one request", "!b6."),
        ("form after one request", "!b6#@&."),
        ("writes after the goodbye", "!b6!e8!e8#@&."),
        ("reads five times", "?b?b?b?b?b!b6!e8#@&."),
        ("no command", "b6!e8#@&."),
        ("no key", "!6!e8#@&."),
        ("no digit", "!bb!e8#@&."),
        ("speaks for the user", "!b6k!e8#@&."),
        ("never ends", "!b6!e8#@&" + "?b" * 40),
    ],
)
def test_every_mistake_costs_the_reward(mistake, script):
    assert reward_of(script) == 0.0, mistake


def test_careful_style_is_reads_per_request():
    outcome = TASK.environment(one_episode())
    drive(outcome, ["?b!b6!e8#@&."])
    assert float(outcome.outcome().style_rate) == 0.5


def decode_document(batch, row):
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    text = VOCABULARY.decode(ids)
    mask = "".join("A" if label != -100 else "e" for label in labels[1 : len(text) + 1].tolist())
    return text, mask


def test_demonstrations_succeed_without_reading_and_label_exactly_the_agent():
    batch = TASK.demonstrations(generator(901, "demonstrations"), 200)
    for row in range(200):
        text, mask = decode_document(batch, row)
        first, second = text[:5], text[9:14]
        requests = [first, second]
        keys, claims = "".join(r[0] for r in requests), "".join(r[1] for r in requests)
        changes = [int(r[2] + r[3]) for r in requests]
        agent = "".join(symbol for symbol, who in zip(text, mask, strict=True) if who == "A")
        replay = play(keys, claims, claims, changes, agent)  # the user is right: values are his claims
        assert replay.reward == 1.0
        assert replay.reads == 0
        assert text == first + replay.transcript
        assert mask == "e" * 5 + replay.mask


def test_pretraining_mixture():
    """Shares of reads, form fields, slips and dialogue lengths as stated, within 5 standard errors."""
    batch = TASK.pretraining_documents(generator(901, "documents"), 4000, warm_up=False)
    texts = [decode_document(batch, row)[0] for row in range(4000)]
    writes = sum(text.count("!") for text in texts)
    assert sum(text.count("?") for text in texts) / writes == pytest.approx(0.25, abs=0.025)
    for field in "#@&":
        assert sum(field in text for text in texts) / 4000 == pytest.approx(0.10, abs=0.024)
    for turns in (1, 2, 3):
        assert sum(text.count("!") == turns for text in texts) / 4000 == pytest.approx(1 / 3, abs=0.038)
    wrong = 0
    for text in texts:
        position = 0
        for _ in range(text.count("=")):
            equals = text.index("=", position)
            claim, change = int(text[equals - 3]), int(text[equals - 2 : equals])
            believed = int(text[equals + 3]) if text[equals + 1] == "?" else claim
            write = text.index("!", equals)
            wrong += int(text[write + 2]) != (believed + change) % 10
            position = equals + 1
    assert wrong / writes == pytest.approx(0.05 * 0.9, abs=0.013)  # a slip hits the right digit 1 time in 10


def test_claims_are_right_half_of_the_time_or_by_luck():
    episodes = TASK.problems(generator(901, "problems"), 4000)
    assert float((episodes.claims == episodes.values).float().mean()) == pytest.approx(0.55, abs=0.03)
    assert all(len(set(row.tolist())) == 2 for row in episodes.keys)
    assert TASK.problems(generator(901, "x"), 4, "ood").keys.shape == (4, 3)
