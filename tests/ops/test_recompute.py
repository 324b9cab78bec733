"""Activation checkpointing repeats hooks; `is_recomputing` lets them count once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_rejuv import ops
from tests.ops.test_library import Probed


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_guarded_hook_counts_a_checkpointed_layer_once(use_reentrant):
    torch.manual_seed(0)
    net, x = Probed(), torch.randn(4, 8, requires_grad=True)
    net(x)
    expected = net.table.clone()
    net.table.zero_()
    checkpoint(net, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(net.table, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_does_repeat_the_hook(use_reentrant):
    """Canary: what the guard is for. It also fails if torch stops reporting a backward in progress."""
    seen = []
    layer, x = torch.nn.Linear(2, 2), torch.randn(1, 2, requires_grad=True)
    layer.register_forward_pre_hook(lambda *_: seen.append(ops.is_recomputing()))
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True]
    assert not ops.is_recomputing()


def test_compiled_and_checkpointed_graph_counts_once():
    torch.manual_seed(0)
    net, x = Probed(), torch.randn(4, 8, requires_grad=True)
    net(x)
    expected = net.table.clone()
    net.table.zero_()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda y: checkpoint(net, y, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    compiled(x).sum().backward()
    torch.testing.assert_close(net.table, expected)
