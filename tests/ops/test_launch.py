"""How a device is filled: the split of a vocabulary over programs, on paper."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightning_rejuv.ops import triton_launch as launch

VOCABULARY, STEP = 151936, 2048
DEVICES = [132, 108]


def fill(rows: int, parts: int, chunk: int, multiprocessors: int) -> float:
    """Share of the memory's time that is spent on logits: rounds of programs, each with one step in flight."""
    steps = chunk // STEP
    resident = multiprocessors * launch.TOKEN_PROGRAMS_PER_SM
    busy = multiprocessors * launch.BUSY_PROGRAMS_PER_SM
    rounds, rest = divmod(rows * parts, resident)
    spent = steps * (rounds * resident + (max(rest, busy) if rest else 0))
    return rows * launch.ceil_div(VOCABULARY, STEP) / spent


@pytest.mark.parametrize("multiprocessors", DEVICES)
def test_any_number_of_rows_fills_the_device(multiprocessors):
    filled = {
        rows: fill(rows, *launch.split_vocabulary(rows, VOCABULARY, STEP, multiprocessors), multiprocessors)
        for rows in range(1, 8193)
    }
    assert min(filled[rows] for rows in range(64, 8193)) > 0.85
    few = [filled[rows] for rows in range(1, 65)]
    assert all(more >= 0.95 * fewer for fewer, more in pairwise(few))


@pytest.mark.parametrize("multiprocessors", DEVICES)
@pytest.mark.parametrize("vocabulary", [1, 2048, 2049, 32001, 50257, VOCABULARY])
def test_parts_cover_the_row_and_are_few(multiprocessors, vocabulary):
    steps = launch.ceil_div(vocabulary, STEP)
    for rows in range(1, 8193, 7):
        parts, chunk = launch.split_vocabulary(rows, vocabulary, STEP, multiprocessors)
        assert chunk % STEP == 0
        assert (parts - 1) * chunk < vocabulary <= parts * chunk
        assert parts <= min(steps, launch.MOST_PARTS)
        # Splitting makes up for one round that is not full; it does not fill many.
        assert rows * (parts - 1) <= 10 * multiprocessors * launch.TOKEN_PROGRAMS_PER_SM


def test_few_rows_are_split_further():
    parts = [
        launch.split_vocabulary(rows, VOCABULARY, STEP, 132)[0] for rows in (1, 64, 264, 512, 1024, 8192)
    ]
    assert parts == sorted(parts, reverse=True)
    assert parts[0] > 8
    assert parts[-1] == 1


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 14336 * 4096, 2**33 + 1])
def test_every_element_belongs_to_one_program(monkeypatch, count):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    programs, steps = launch.spread(count, 1024, torch.device("cpu"))
    assert (programs - 1) * steps * 1024 < count <= programs * steps * 1024
    assert programs <= 132 * launch.ELEMENT_PROGRAMS_PER_SM
