"""What only a GPU can show: memory, CUDA graphs, no wait for the device. Values: the conformance suite."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv import ops
from tests.gpu import needs_cuda

pytestmark = needs_cuda


def run_all(h: torch.Tensor, target: torch.Tensor, table: torch.Tensor) -> ops.TokenStats:
    ops.activation_stats(h, eps=0.1, out=table)
    ops.grad_activation_stats(h, h)
    ops.weight_drift(h, h)
    return ops.token_stats(h, target)


@pytest.fixture
def inputs():
    h = torch.randn(4096, 8192, device="cuda").bfloat16()
    target = torch.randint(0, 8192, (4096,), device="cuda")
    table = torch.zeros(7, 8192, dtype=torch.float64, device="cuda")
    run_all(h, target, table)
    return h, target, table.zero_()


def test_memory_is_the_partial_buffers(inputs):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_all(*inputs)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < inputs[0].nbytes / 4


def test_no_op_waits_for_the_device(inputs):
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays(inputs):
    h, target, table = inputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = run_all(h, target, table)
    table.zero_()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert table[6].eq(2 * h.shape[0]).all()
    torch.testing.assert_close(stats.entropy, ops.token_stats(h, target).entropy, rtol=0, atol=0)
