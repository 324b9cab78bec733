"""Canaries of what FSDP and DTensor keep private."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from lightning_rejuv._compat import (
    class_before_fsdp2,
    fsdp1_interval,
    is_fsdp1_parameter,
    is_hugging_face,
    local_offset,
    wraps_others,
)
from tests.conftest import tiny_llama
from tests.processes import run_in_processes
from tests.sharding import fsdp1, fsdp2


def test_offsets_say_where_a_local_shard_lies(tmp_path):
    def look(rank):
        model = tiny_llama()
        wholes = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in fsdp2(model).named_parameters():
            first = local_offset(p)[0]
            local = p.to_local()
            assert torch.equal(local, wholes[name][first : first + len(local)])
            assert wraps_others(p)
        return class_before_fsdp2(model) is type(tiny_llama())

    assert run_in_processes(look, tmp_path, 3) == [True] * 3


def test_intervals_say_which_elements_a_flat_shard_holds(tmp_path):
    def look(rank):
        model = tiny_llama()
        wholes = {id(p): p.detach().clone().flatten() for p in model.parameters()}
        wrapped = fsdp1(model)
        held = 0
        for unit in FSDP.fsdp_modules(wrapped):
            for p in unit._handle.flat_param._params:
                start, stop = fsdp1_interval(unit, p)
                assert torch.equal(p.detach().flatten(), wholes[id(p)][start:stop])
                assert is_fsdp1_parameter(p)
                held += stop - start
        return held

    total = sum(p.numel() for p in tiny_llama().parameters())
    assert sum(run_in_processes(look, tmp_path, 3)) == total


def test_plain_modules_are_none_of_it():
    net = nn.Linear(2, 2)
    assert not is_fsdp1_parameter(net.weight)
    assert not wraps_others(net.weight)
    assert not is_hugging_face(net)
    assert is_hugging_face(tiny_llama())
    assert class_before_fsdp2(net) is nn.Linear
