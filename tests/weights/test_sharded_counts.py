"""What is added up over processes: an element that several of them hold counts once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_rejuv import rejuvenate
from lightning_rejuv.weights.drift import measure_drift
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.open_layout import open_layout
from tests.conftest import shift_of_alpha, shifted, tiny_llama
from tests.processes import run_in_processes
from tests.sharding import tensor_parallel


def test_what_rounding_does_is_that_of_a_single_process(tmp_path):
    """Under tensor parallelism every process holds the norms and the tables whole, and a part of the rest."""
    base = tiny_llama(dtype=torch.bfloat16)
    sft = shifted(base, 2e-4)
    with torch.no_grad():  # rounding does less to the tables than to the sharded projections
        sft.lm_head.weight.add_(2e-3)
    expected = copy.deepcopy(sft)
    before, anchor = ({n: p.detach().clone() for n, p in m.named_parameters()} for m in (sft, base))
    rejuvenate(expected, base, alpha=0.3, rounding="nearest")
    after = {n: p.detach() for n, p in expected.named_parameters()}
    shift = shift_of_alpha(before, anchor, after, 0.3)
    assert abs(shift) > 0.01

    def edit(rank):
        model = tensor_parallel(copy.deepcopy(sft))
        return rejuvenate(model, base, alpha=0.3, rounding="nearest").rounding_shift

    assert run_in_processes(edit, tmp_path) == pytest.approx([shift] * 2, rel=1e-3)


def test_the_sums_of_shards_and_of_copies_are_those_of_a_single_process(tmp_path):
    """DTensors that are sharded, that are replicated, and a plain parameter, side by side."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))

    base = make()
    expected = measure_drift(Layout(dict(shifted(base).named_parameters())), base.get_parameter)

    def measure(rank):
        net = shifted(base)
        mesh = init_device_mesh("cpu", (2,))
        for layer, placement in zip(net, (Shard(0), Replicate()), strict=False):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [placement]))
        found = measure_drift(open_layout(net), base.get_parameter)
        return {name: (drift.difference, drift.base) for name, drift in found.items()}

    for found in run_in_processes(measure, tmp_path):
        assert found.keys() == expected.keys()
        for name, drift in expected.items():
            assert found[name] == pytest.approx((drift.difference, drift.base), rel=1e-6)
