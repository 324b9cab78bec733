"""Sharded tensors: refused with the way out named, and right by that way."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_rejuv import ops

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def sharded(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda s, x: ops.activation_stats(s), "h"),
        (lambda s, x: ops.activation_stats(x, s[:, 0]), "mask"),
        (lambda s, x: ops.activation_stats(x, out=s), "out"),
        (lambda s, x: ops.grad_activation_stats(x, s), "grad"),
        (lambda s, x: ops.weight_drift(torch.nn.Parameter(s), x), "weight"),
        (lambda s, x: ops.weight_drift(x, s), "base"),
        (lambda s, x: ops.token_stats(s), "logits"),
        (lambda s, x: ops.token_stats_from_hidden(x, s), "weight"),
    ],
)
def test_sharded_tensors_are_refused(sharded, call, name):
    with pytest.raises(
        TypeError, match=rf"`{name}` to be a plain tensor but got a DTensor.*`{name}.to_local\(\)`"
    ):
        call(sharded, torch.randn(6, 4))


def test_local_shards_work(sharded):
    local, whole = sharded.to_local(), sharded.full_tensor()
    found = ops.weight_drift(local, torch.zeros_like(whole)).rows.weight_square
    torch.testing.assert_close(found, whole.double().square().sum(1), rtol=1e-6, atol=0.0)
