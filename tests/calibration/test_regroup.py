"""Rows of batches put together anew: each as it was, in batches that are no larger."""

from __future__ import annotations

import torch

from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.calibration.regroup import Pool, shuffled
from lightning_rejuv.forward import forward_logits
from tests.conftest import batch, float64_llama, greedy_batch, tiny_llama


def row_nlls(model, batches):
    """Summed negative log-likelihood of every response, sorted."""
    found = []
    for part in batches:
        log_probs = forward_logits(model, part.inputs)[:, :-1].log_softmax(-1)
        told = -log_probs.gather(-1, part.targets[..., None])[..., 0] * part.response
        found += told.sum(1).tolist()
    return sorted(found)


def as_rows(batches):
    """What of each row counts, as plain tuples."""
    rows = []
    for part in batches:
        for number, length in enumerate(part.lengths.tolist()):
            ids = part.inputs["input_ids"][number, :length]
            told = part.response[number, : length - 1]
            rows.append(
                (
                    tuple(ids.tolist()),
                    tuple(told.tolist()),
                    tuple(part.targets[number][: length - 1].tolist()),
                )
            )
    return sorted(rows)


@torch.no_grad()
def test_rows_stay_what_they_were_whatever_they_are_put_together_with():
    model = float64_llama()
    data = [
        batch(rows=4, length=11, seed=1),
        greedy_batch(tiny_llama(), rows=3, length=6),
        batch(rows=1, length=5),
    ]
    batches = as_batches(data)
    pool = Pool(batches)
    assert len(pool) == 8
    (drawn,) = pool.draws(8, 1, seed=0)
    assert as_rows(drawn) == as_rows(batches)
    torch.testing.assert_close(torch.tensor(row_nlls(model, drawn)), torch.tensor(row_nlls(model, batches)))
    most = max(b.inputs["input_ids"].numel() for b in batches)
    assert all(part.inputs["input_ids"].numel() <= most for part in drawn)
    assert len(drawn) == 2  # as few as they fit into: 8 rows of at most 11 tokens, 44 at a time
    single = Pool(as_batches([{k: v[:1] for k, v in d.items()} for d in data]))
    assert [len(part.response) for part in next(single.draws(3, 1, seed=0))] == [1, 1, 1]


def test_long_and_short_rows_that_alternate_are_put_together_by_length():
    """Four of 12 tokens and four of 3, 24 at a time: two parts of long ones and one of short, in any order."""
    data = [
        batch(rows=2, length=12, seed=1),
        batch(rows=4, length=3, seed=2),
        batch(rows=2, length=12, seed=3),
    ]
    for part in data:
        part["attention_mask"].fill_(1)
        part["labels"] = part["input_ids"].clone()
        part["labels"][:, 0] = -100
    pool = Pool(as_batches(data))
    for seed in range(5):
        (drawn,) = pool.draws(8, 1, seed)
        shapes = sorted(tuple(part.inputs["input_ids"].shape) for part in drawn)
        assert shapes == [(2, 12), (2, 12), (4, 3)]
        assert pool.count(8, 1, seed) == 3


@torch.no_grad()
def test_positions_and_masks_go_along():
    model = float64_llama()
    plain = greedy_batch(tiny_llama(), rows=2, length=7)
    later = {**plain, "position_ids": torch.arange(5, 12).expand(2, -1)}
    batches = as_batches([later, batch(rows=2, length=9, seed=3)])
    assert "position_ids" in batches[0].inputs
    assert "position_ids" not in batches[1].inputs
    for size in (1, 2, 4):
        parts = [part for drawn in Pool(batches).draws(size, 4 // size, seed=1) for part in drawn]
        found, expected = row_nlls(model, parts), row_nlls(model, batches)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_all_come_before_one_comes_again():
    drawn = list(shuffled(5, 3, 5, seed=2))
    assert [len(numbers) for numbers in drawn] == [3] * 5
    flat = [number for numbers in drawn for number in numbers]
    assert all(sorted(flat[first : first + 5]) == [0, 1, 2, 3, 4] for first in (0, 5, 10))
    assert flat[:5] != flat[5:10]
    assert drawn == list(shuffled(5, 3, 5, seed=2)) != list(shuffled(5, 3, 5, seed=3))


def test_another_default_device_draws_the_same():
    """As with ``torch.set_default_device("cuda")``, on which a generator of the CPU's cannot draw."""
    expected = list(shuffled(5, 3, 5, seed=2))
    with torch.device("meta"):
        assert list(shuffled(5, 3, 5, seed=2)) == expected
