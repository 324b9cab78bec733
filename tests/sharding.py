"""A tiny Llama stored in every way that a strategy stores parameters."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_rejuv._compat import reshard
from lightning_rejuv.names import canonical_name


def fsdp2(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    columns, rows = ColwiseParallel, RowwiseParallel
    for layer in model.model.layers:
        plan = {
            **{f"self_attn.{name}_proj": columns() for name in "qkv"},
            "self_attn.o_proj": rows(),
            "mlp.gate_proj": columns(),
            "mlp.up_proj": columns(),
            "mlp.down_proj": rows(),
        }
        parallelize_module(layer, mesh, plan)
    return model


def both(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fsdp2(tensor_parallel(model, mesh["tensor"]), mesh["data"])


def hybrid(model):
    """FSDP2 whose shards are kept twice."""
    return fsdp2(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def fsdp1(model, **options):
    kinds = {type(model.model.layers[0])}
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
    return FSDP(model, auto_wrap_policy=ModuleWrapPolicy(kinds), **options)


# By name: how many processes it takes, and what shards a model in each of them.
LAYOUTS = {
    "fsdp2": (2, fsdp2),
    "fsdp2 in uneven shards": (3, fsdp2),
    "fsdp2 with replicas": (4, hybrid),
    "tensor parallel": (2, tensor_parallel),
    "fsdp2 and tensor parallel": (4, both),
    "fsdp1": (2, fsdp1),
    "fsdp1 in uneven shards": (3, fsdp1),
}


def whole(model):
    """The parameters as lists, put together with PyTorch's own tools."""
    reshard(model)
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model):
            return {canonical_name(n): p.tolist() for n, p in model.named_parameters()}
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(model.parameters())):
            return {name: p.tolist() for name, p in model.named_parameters()}
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).tolist() for n, t in tensors.items()}
