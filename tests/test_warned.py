"""Warnings of the library: as Python raises them, and collected for a report."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest
import torch

import lightning_rejuv
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.calibration.bounded import MAX_STREAMED
from lightning_rejuv.warned import collecting_warnings, warn
from tests.conftest import batch


def test_a_warning_is_about_the_callers_line_and_is_raised_though_it_is_collected():
    def told():
        warn("two up", stacklevel=2)

    with warnings.catch_warnings(record=True) as raised, collecting_warnings() as collected:
        warnings.simplefilter("always")
        warn("here")
        told()
    assert [(str(w.message), w.category, Path(w.filename)) for w in raised] == [
        ("here", UserWarning, Path(__file__)),
        ("two up", UserWarning, Path(__file__)),
    ]
    assert raised[1].lineno - raised[0].lineno == 1
    assert collected == ["here", "two up"]


def test_filters_do_not_matter_and_every_text_is_collected_once():
    with warnings.catch_warnings(), collecting_warnings() as collected:
        warnings.simplefilter("ignore")
        for text in ("a", "b", "a"):
            warn(text)
        warnings.warn("another library's", stacklevel=1)
    assert collected == ["a", "b"]
    with warnings.catch_warnings(), collecting_warnings() as collected:
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a"):
            warn("a")
    assert collected == ["a"]


def test_another_thread_and_what_follows_are_not_heard():
    with warnings.catch_warnings(), collecting_warnings() as collected:
        warnings.simplefilter("ignore")
        thread = threading.Thread(target=warn, args=("elsewhere",))
        thread.start()
        thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn("afterwards")
    assert collected == []


def test_everything_that_the_library_warns_of_goes_this_way():
    """But in `functional/`, which imports torch alone and is in no report's way."""
    root = Path(lightning_rejuv.__file__).parent
    direct = [
        str(file.relative_to(root))
        for file in sorted(root.rglob("*.py"))
        if "warnings.warn(" in file.read_text().partition("def collecting_warnings")[0]
    ]
    assert direct == ["functional/spectrum.py", "warned.py"]


def test_what_calibration_data_are_warned_of():
    uncovered = batch()
    uncovered["labels"] = uncovered["input_ids"].masked_fill(uncovered["attention_mask"] == 0, -100)
    padded = batch()
    padded["labels"] = torch.where(padded["labels"] == -100, -100, padded["input_ids"])
    padded["labels"][0, -1] = padded["input_ids"][0, -1]
    for data, message in (
        ([uncovered], "No prompt token of the calibration data is masked"),
        ([padded], "labels of calibration batch 0 cover padding"),
        ((batch(rows=64, seed=seed) for seed in range(4)), f"hold more than {MAX_STREAMED} responses"),
    ):
        with pytest.warns(UserWarning, match=message), collecting_warnings() as collected:
            as_batches(data)
        assert len(collected) == 1
        assert message in collected[0]
