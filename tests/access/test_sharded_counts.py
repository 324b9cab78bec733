"""What is counted over processes: an element that several of them hold counts once."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import rejuvenate
from tests.conftest import shifted, tiny_llama
from tests.processes import run_in_processes
from tests.sharding import tensor_parallel


def test_what_rounding_loses_is_that_of_a_single_process(tmp_path):
    """Under tensor parallelism every process holds the norms and the tables whole, and a part of the rest."""
    base = tiny_llama(dtype=torch.bfloat16)
    sft = shifted(base, 2e-4)
    with torch.no_grad():  # the tables lose less than the sharded projections
        sft.lm_head.weight.add_(0.1)
    expected = copy.deepcopy(sft)
    before, anchor = ({n: p.detach().clone() for n, p in m.named_parameters()} for m in (sft, base))
    rejuvenate(expected, base, alpha=0.5, reset_fraction=0)
    changed = lost = 0
    for name, parameter in expected.named_parameters():
        moved = before[name] != anchor[name]
        changed += int(moved.sum())
        lost += int((moved & ((parameter == before[name]) | (parameter == anchor[name]))).sum())
    assert 0 < lost < changed

    def edit(rank):
        model = tensor_parallel(copy.deepcopy(sft))
        return rejuvenate(model, base, alpha=0.5, reset_fraction=0).rounding_lost

    assert run_in_processes(edit, tmp_path) == pytest.approx([lost / changed] * 2)
