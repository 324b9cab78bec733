"""When gradients are half accumulated; the rest is tested in fits, in test_fit_modes.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_rejuv.callbacks._training import Accumulation


def _deepspeed(micro_steps, window):
    engine = SimpleNamespace(micro_steps=micro_steps, gradient_accumulation_steps=lambda: window)
    strategy = SimpleNamespace(handles_gradient_accumulation=True, model=engine)
    return SimpleNamespace(strategy=strategy, accumulate_grad_batches=window)


def test_deepspeed_counts_on_across_the_end_of_an_epoch():
    """Three batches an epoch and windows of two: the first batch of the second epoch ends a window."""
    accumulation = Accumulation()
    found = [accumulation.unfinished(_deepspeed(batch, 2), batch % 3) for batch in range(7)]
    assert found == [False, True, False, True, False, True, False]


def test_it_asks_for_names_that_deepspeed_has():
    """Its engine is not built here; its source is read where it is installed."""
    found = importlib.util.find_spec("deepspeed")
    if found is None:
        pytest.skip("DeepSpeed is not installed")
    source = (Path(found.origin).parent / "runtime" / "engine.py").read_text()
    assert "self.micro_steps += 1" in source
    assert "def gradient_accumulation_steps(self)" in source
