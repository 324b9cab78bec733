"""The whole copy of a sharded model: the same function, whatever is tied, buffered or kept beside."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv.weights.open_targets import open_targets
from lightning_rejuv.weights.replica import make_replica
from tests.conftest import batch, sharpened, tiny_llama
from tests.processes import run_in_processes
from tests.sharding import fsdp1, fsdp2, tensor_parallel


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("shard", [fsdp2, tensor_parallel, fsdp1])
def test_it_computes_what_the_model_does(shard, changes, tmp_path):
    base = tiny_llama(**changes)
    sft = sharpened(base)
    inputs = batch()["input_ids"]
    expected = sft(inputs).logits

    def gather(rank):
        model = shard(copy.deepcopy(sft))
        replica = make_replica(model, open_targets(model, base))
        if rank:
            return replica is None
        found = dict(replica.model.named_parameters())
        same = all(torch.equal(found[name], p) for name, p in sft.named_parameters())
        own = all(p.grad_fn is None and p.device.type == "cpu" for p in found.values())
        return (
            same
            and own
            and torch.equal(replica.model(inputs).logits, expected)
            and not replica.model.training
        )

    assert run_in_processes(gather, tmp_path) == [True, True]


def test_it_is_pulled_where_the_model_is_and_its_base_ends_as_the_base_does(tmp_path):
    """The plan is that of a single process: samples of the base end with the base's own tokens."""
    base = tiny_llama()
    base.generation_config.eos_token_id = [5, 7]
    sft = sharpened(base)

    def gather(rank):
        model = fsdp2(copy.deepcopy(sft))
        targets = open_targets(model, base)
        replica = make_replica(model, targets)
        drift = {name: d.relative for name, d in targets.measure().items()}  # a collective
        if rank:
            return True
        alone = open_targets(sft, base)
        assert replica.targets.base_ends == targets.base_ends == alone.base_ends == (5, 7)
        assert {name: d.relative for name, d in replica.targets.measure().items()} == pytest.approx(drift)
        return all(torch.equal(replica.targets.base_of(name), alone.base_of(name)) for name in alone.fused)

    assert run_in_processes(gather, tmp_path) == [True, True]
