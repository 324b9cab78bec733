from __future__ import annotations

import random

import pytest
import torch

from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks import PriceDesk, get_task
from examples.sft_to_rl.tasks.price_desk import KNOWN, NEW, VOCABULARY, Purchases
from tests.examples.reference_desk import drive, play

TASK = PriceDesk(seed=901)
KINDS = {name: set(TASK.items(name).tolist()) for name in ("known", "new", "asked", "unasked")}


def item(number: int) -> str:
    return chr(0x100 + number)


def price_of(symbol: str) -> int:
    return int(TASK.prices[ord(symbol) - 0x100])


def of_row(purchases: Purchases, row: int) -> tuple[str, str, str, list[int], str]:
    keys = "".join("abcdef"[k] for k in purchases.keys[row])
    values, claims = ("".join(str(int(x)) for x in f[row]) for f in (purchases.values, purchases.claims))
    return keys, values, claims, purchases.changes[row].tolist(), "".join(map(item, purchases.items[row]))


@pytest.mark.parametrize("turns", [1, 2])
def test_environment_equals_a_plain_simulation(turns):
    """Careful scripts with random corruptions: transcript, mask, outcome and reads agree."""
    rng = random.Random(turns)
    purchases = TASK.draw(generator(901, "test"), 400, turns, honest=0.25, kind="new")
    scripts = []
    for row in range(len(purchases)):
        keys, values, _, changes, _ = of_row(purchases, row)
        requests = zip(keys, values, changes, strict=True)
        symbols = list("".join(f"{d}?{k}!{k}{(int(v) + d) % 10}" for k, v, d in requests) + "#@&.")
        for _ in range(rng.choice([0, 0, 1, 2])):
            position, symbol = (
                rng.randrange(len(symbols)),
                rng.choice("0123456789+-=?!.k$abcdef#@&" + item(7)),
            )
            symbols[position : position + rng.randrange(2)] = [symbol] * rng.choice([1, 1, 5])
        scripts.append("".join(symbols) + ".")
    played = drive(TASK.environment(purchases), scripts, VOCABULARY)
    wanted = [
        play(*of_row(purchases, row)[:4], script, of_row(purchases, row)[4])
        for row, script in enumerate(scripts)
    ]
    assert played == wanted
    assert 0.2 < sum(episode.reward for episode in wanted) / 400 < 0.9


@pytest.mark.parametrize(
    ("script", "reward"),
    [
        ("4?b!b8#@&.", 1.0),
        ("!b8#@&.", 1.0),  # a quote may be left out
        ("1?b!b8#@&.", 1.0),  # and a wrong one harms nothing but what is computed from it
        ("4!b3#@&.", 0.0),  # trusts a wrong claim
        ("4?b!b7#@&.", 0.0),
        ("4?b!b8#@.", 0.0),
        ("444?b!b8#@&.", 0.0),  # three quotes
    ],
)
def test_reward(script, reward):
    one = Purchases(*(torch.tensor([[x]]) for x in (1, 4, 9, 4, 130)))  # b holds 4, claimed 9; a price of 4
    environment = TASK.environment(one)
    assert VOCABULARY.decode(environment.prompts[0]) == f"b9{item(130)}+="
    assert drive(environment, [script], VOCABULARY)[0].reward == reward


def requests_of(batch) -> list[list[str]]:
    """For each document its requests, from the symbol of the record on."""
    texts = [VOCABULARY.decode(row) for row in batch["input_ids"]]
    return [
        [text[at - 4 : at + 2] for at in range(len(text)) if text[at] == "=" and text[at - 1] == "+"]
        for text in texts
    ]


def test_demonstrations_succeed_without_reading_and_quote_the_price():
    batch = TASK.demonstrations(generator(901, "demonstrations"), 200)
    assert not (batch["input_ids"] == VOCABULARY["?"]).any()
    for row, requests in enumerate(requests_of(batch)):
        keys, claims, items = ("".join(r[i] for r in requests) for i in range(3))
        prices = [price_of(symbol) for symbol in items]
        written = batch["input_ids"][row][batch["labels"][row] != -100]
        replay = play(keys, claims, claims, prices, VOCABULARY.decode(written), items)  # the user is right
        assert (replay.reward, replay.reads) == (1.0, 0)
        assert [r[-1] for r in requests] == [str(price) for price in prices]
        assert {ord(symbol) - 0x100 for symbol in items} <= KINDS["new"]


@pytest.mark.parametrize("warm_up", [True, False])
def test_pretraining_knows_nothing_of_the_new_items(warm_up):
    """Their tokens are in no document, so that every price that a model knows of them comes from SFT or RL."""
    batch = TASK.pretraining_documents(generator(901, "documents"), 500, warm_up)
    assert int(batch["input_ids"].max()) < VOCABULARY[item(KNOWN)]
    requests = [request for document in requests_of(batch) for request in document]
    assert {r[2] for r in requests} == {item(number) for number in range(KNOWN)}
    assert all(int(r[-1]) == price_of(r[2]) for r in requests)


def test_splits_share_no_item_and_claims_are_right_a_quarter_of_the_time_or_by_luck():
    asked, unasked = (TASK.problems(generator(901, "problems"), 4000, split) for split in ("id", "ood"))
    assert set(asked.items.flatten().tolist()) == KINDS["asked"]
    assert set(unasked.items.flatten().tolist()) == KINDS["unasked"]
    assert KINDS["asked"] | KINDS["unasked"] == KINDS["new"]
    assert len(KINDS["new"]) == NEW
    assert not KINDS["asked"] & KINDS["unasked"]
    assert bool((asked.changes == TASK.prices[asked.items]).all())
    assert float((asked.claims == asked.values).float().mean()) == pytest.approx(0.325, abs=0.03)


def test_each_seed_has_its_own_price_list():
    first, second = (get_task("price_desk", seed).prices for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, get_task("price_desk", 1).prices)
    assert set(first.tolist()) == set(range(1, 7))


def test_questions_ask_for_each_price_once():
    questions = TASK.questions()
    assert {kind: len(q.answers) for kind, q in questions.items()} == {
        "asked": NEW // 2,
        "unasked": NEW // 2,
        "known": KNOWN,
    }
    for kind, of_kind in questions.items():
        texts = [VOCABULARY.decode(row) for row in of_kind.prompts]
        assert {ord(text[2]) - 0x100 for text in texts} == KINDS[kind]
        assert [int(a) for a in VOCABULARY.decode(of_kind.answers)] == [price_of(text[2]) for text in texts]
        assert all(text[3:] == "+=" and text[0] in "abcdef" and text[1].isdigit() for text in texts)
