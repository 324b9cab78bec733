"""Which layout a model has is told by its parameters; an unknown kind is refused, never guessed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.testing._internal.two_tensor import TwoTensor

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.metrics import PlasticityMonitor
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.open_layout import open_layout
from tests.conftest import greedy_batch, sharpened, tiny_llama
from tests.processes import run_in_processes
from tests.sharding import fsdp1, fsdp2, tensor_parallel, whole


def test_plain_parameters_are_walked_in_place():
    model = tiny_llama()
    layout = open_layout(model)
    assert type(layout) is Layout
    assert not layout.sharded
    for name, shard in layout.walk(["lm_head.weight"], write=True):
        assert name == "lm_head.weight"
        shard.values.zero_()
    assert not model.lm_head.weight.any()
    assert [name for name, _ in layout.wholes()] == [name for name, _ in model.named_parameters()]


def test_an_unknown_kind_of_parameter_is_refused_by_name():
    net = nn.Linear(2, 2, bias=False)
    net.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"Expected plain parameters, DTensors .*'weight \(TwoTensor\)'"):
        rejuvenate(net, nn.Linear(2, 2, bias=False), alpha=0.5)


def test_an_unknown_kind_beside_a_known_one_is_refused(tmp_path):
    def attempt(rank):
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        net[1].weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
        fully_shard(net[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"but got \['1.weight \(TwoTensor\)'\]"):
            open_layout(net)

    run_in_processes(attempt, tmp_path, 1)


def refusals(tmp_path, make, size=2):
    """The messages with which every process refuses what `make` does."""

    def attempt(rank):
        try:
            make()
        except ValueError as error:
            return str(error)
        return None

    return run_in_processes(attempt, tmp_path, size)


def test_a_pending_sum_is_refused(tmp_path):
    def make():
        net = nn.Linear(2, 2, bias=False)
        mesh = init_device_mesh("cpu", (2,))
        net.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
        open_layout(net)

    assert all("sharded or replicated" in text and "weight" in text for text in refusals(tmp_path, make))


def test_concatenated_parameters_are_refused(tmp_path):
    def make():
        open_layout(fsdp1(tiny_llama(), use_orig_params=False))

    assert all("use_orig_params=True" in text for text in refusals(tmp_path, make))


def test_a_parameter_outside_the_fsdp_unit_that_was_given_is_refused(tmp_path):
    def make():
        model = fsdp1(tiny_llama())
        open_layout(model.module)  # the embedding belongs to the outermost unit

    assert all(
        "belong to an FSDP unit" in text and "embed_tokens" in text for text in refusals(tmp_path, make)
    )


def test_adapters_are_refused_where_parameters_are_sharded(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up_proj"], r=2)

    def make():
        model = peft.get_peft_model(tiny_llama(), config)
        rejuvenate(fsdp2(model.base_model.model), None, alpha=0.5)

    assert all(
        "model without adapters, since its parameters are sharded," in text
        for text in refusals(tmp_path, make)
    )


def test_a_reset_needs_a_model_that_can_be_built_again(tmp_path):
    def changed():
        model = tiny_llama()
        model.model.layers[0].mlp.extra = nn.Linear(2, 2)
        base = copy.deepcopy(model)
        rejuvenate(fsdp2(model), base, [greedy_batch(tiny_llama())], alpha=0.5, reset=Reset(fraction=0.1))

    assert all("the model was changed after it was built" in text for text in refusals(tmp_path, changed))


def test_every_process_learns_of_a_failure_on_rank_zero(tmp_path):
    base = tiny_llama()

    def attempt(rank):
        model = fsdp2(sharpened(base))
        before = whole(model)
        with pytest.raises((ValueError, RuntimeError)) as failure:
            rejuvenate(model, base, [], alpha=0.5, reset=Reset(fraction=0.1))
        return str(failure.value), whole(model) == before

    (first, kept), (second, also_kept) = run_in_processes(attempt, tmp_path)
    assert kept
    assert also_kept
    assert "at least one" in first
    assert second == f"Planning failed on rank 0: {first}"


@pytest.mark.parametrize("shard", [fsdp2, tensor_parallel, fsdp1])
def test_a_resized_vocabulary(shard, tmp_path):
    base = tiny_llama(vocab_size=20)
    sft = sharpened(tiny_llama())
    expected = copy.deepcopy(sft)
    options = {"alpha": 0.3, "resize_vocabulary": True}
    rejuvenate(expected, base, **options)

    def edit(rank):
        model = shard(copy.deepcopy(sft))
        rejuvenate(model, base, **options)
        return whole(model)

    for weights in run_in_processes(edit, tmp_path):
        assert weights == {name: p.tolist() for name, p in expected.named_parameters()}


@pytest.mark.parametrize("shard", [fsdp2, tensor_parallel, fsdp1])
def test_the_monitor_measures_drift_in_shards(shard, tmp_path):
    base = tiny_llama()
    sft = sharpened(base)
    with torch.no_grad():
        sft.model.norm.weight.copy_(base.model.norm.weight)

    def values(model):
        monitor = PlasticityMonitor(anchor=base)
        monitor.measure_drift(model)
        found = {name: float(value) for name, value in monitor.compute_model().items()}
        return {name: found[name] for name in ("relative_drift", "drift_sparsity")}

    expected = values(sft)
    assert expected["drift_sparsity"] > 0
    for found in run_in_processes(lambda rank: values(shard(copy.deepcopy(sft))), tmp_path):
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_probe_is_refused_where_parameters_are_sharded(tmp_path):
    base = tiny_llama()

    def make():
        PlasticityMonitor(anchor=base, probe=[greedy_batch(base)]).measure(fsdp2(sharpened(base)))

    assert all(
        "to run the base in the model's place but they are sharded" in t for t in refusals(tmp_path, make)
    )
