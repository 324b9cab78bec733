from __future__ import annotations

import pytest

from lightning_rejuv.alpha.doubts import doubt_few, doubt_seen, doubt_swapped, doubt_unfinished


def test_it_says_if_samples_are_cut_off():
    assert doubt_unfinished(24, 2) == ()
    assert doubt_unfinished(24, 10) == (
        "10 of the base's 24 samples did not end: their beginnings were judged.",
    )


@pytest.mark.parametrize(
    ("demonstrations", "responses", "told"),
    [
        (8, 8, None),
        (7, 8, "7 demonstrations and 8 samples"),
        (64, 1, "64 demonstrations and 1 sample of the base"),
    ],
)
def test_it_says_if_there_is_little_to_go_by(demonstrations, responses, told):
    doubts = doubt_few(demonstrations, responses)
    assert len(doubts) == bool(told)
    if told:
        assert doubts[0].startswith(f"Alpha goes by {told}")


@pytest.mark.parametrize(
    ("nll", "entropy", "told"),
    [
        ((10.0, 13.0), (0.3, 4.0), True),  # the base learned them, and the SFT model is what it was before
        ((10.0, 13.0), (1.0, 0.3), False),  # over-confident on demonstrations that it has not seen
        ((10.0, 7.0), (0.3, 4.0), False),
        ((10.0, 10.0), (0.3, 0.3), False),
    ],
)
def test_it_says_if_sft_seems_to_have_taught_the_reverse(nll, entropy, told):
    assert bool(doubt_swapped(nll, entropy)) == told


@pytest.mark.parametrize(
    ("nll", "base", "sft", "told"),
    [
        (0.001, 1.2, 0.004, True),  # V, 20 epochs, what it was trained on
        (0.062, 1.2, 0.081, True),
        (0.623, 1.2, 0.061, False),  # V, 20 epochs, what it has not seen
        (0.311, 1.2, 0.299, False),  # V, 3 epochs, what it has not seen
        (0.1, 0.5, 0.4, False),  # hardly trained: it is as uncertain as its base
        (0.0, 0.0, 0.0, False),
    ],
)
def test_it_says_if_sft_seems_to_have_seen_the_demonstrations(nll, base, sft, told):
    assert bool(doubt_seen(nll, (base, sft))) == told
