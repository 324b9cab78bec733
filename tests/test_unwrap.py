"""A model that comes in a LightningModule, in Fabric's wrapper or in DistributedDataParallel."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import nn

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv._compat import unwrap
from tests.conftest import batch, greedy_batch, sharpened, shifted, tiny_llama
from tests.processes import run_in_processes


class Policy(LightningModule):
    """A language model beside a frozen reference and a head of its own."""

    def __init__(self, model, reference=None):
        super().__init__()
        self.reference = None if reference is None else reference.requires_grad_(False)
        self.model = model
        self.value = nn.Linear(2, 2)


def _data(base):
    return [greedy_batch(base, seed=0), greedy_batch(base, rows=2, seed=1)]


@pytest.mark.parametrize(
    "wrap", [Policy, lambda model: Policy(model, tiny_llama(seed=5))], ids=["alone", "beside"]
)
@pytest.mark.parametrize("options", [{}, {"reset": Reset(fraction=0.1)}], ids=["fusion", "reset"])
def test_a_lightning_module_is_its_language_model(wrap, options):
    base = tiny_llama()
    sft = sharpened(base)
    module = wrap(copy.deepcopy(sft))
    value = module.value.weight.clone()
    data = _data(base) if options else None
    expected = rejuvenate(sft, base, data, alpha=0.5, **options)
    for anchor in (base, Policy(base)):
        inside = copy.deepcopy(module)
        report = rejuvenate(inside, anchor, data, alpha=0.5, **options)
        assert all(
            torch.equal(p, q) for p, q in zip(inside.model.parameters(), sft.parameters(), strict=True)
        )
        assert report.summary() == expected.summary()
        assert torch.equal(inside.value.weight, value)


def test_a_lightning_module_without_a_language_model_is_taken_whole():
    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

    base = Net()
    sft = shifted(base)
    middle = (sft.layer.weight + base.layer.weight).detach() / 2
    rejuvenate(sft, base, alpha=0.5)
    torch.testing.assert_close(sft.layer.weight.detach(), middle)


def test_fabrics_wrapper_and_its_optimizer():
    base = tiny_llama()
    sft = sharpened(base)
    expected = copy.deepcopy(sft)
    summary = rejuvenate(expected, base, _data(base), alpha=0.5, reset=Reset(fraction=0.1)).summary()
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = torch.optim.AdamW(sft.parameters(), lr=0.0)
    model, optimizer = fabric.setup(sft, optimizer)
    assert unwrap(model)[1] is sft
    model(**batch()).loss.backward()
    optimizer.step()
    report = rejuvenate(model, base, _data(base), alpha=0.5, reset=Reset(fraction=0.1), optimizer=optimizer)
    assert report.summary() == summary
    assert all(torch.equal(p, q) for p, q in zip(sft.parameters(), expected.parameters(), strict=True))
    state = optimizer.state[sft.lm_head.weight]
    assert not state["exp_avg"].any()
    assert state["exp_avg_sq"].any()


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "Fabric", "callback's module"])
def test_all_processes_make_the_plan_of_rank_zero(tmp_path, wrapper):
    """Each rank has data, a seed and samples of its own; the weights are equal everywhere afterwards."""
    base = tiny_llama()
    sft = sharpened(base)

    def work(rank):
        torch.manual_seed(rank)
        model = copy.deepcopy(sft)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if wrapper == "Fabric":
            from lightning.fabric.wrappers import _FabricModule

            wrapped = _FabricModule(wrapped, Fabric(accelerator="cpu").strategy, model)
        elif wrapper == "callback's module":
            model = Policy(copy.deepcopy(sft))
            wrapped = nn.parallel.DistributedDataParallel(model)
            model = model.model
        options = {"alpha": "auto", "reset": Reset(fraction=0.1, rank_by="random")}
        report = rejuvenate(wrapped, base, [greedy_batch(base, seed=10 + rank)], seed=rank, **options)
        return {n: p.detach().tolist() for n, p in model.named_parameters()}, report.to_dict()

    (one, report), (other, other_report) = run_in_processes(work, tmp_path)
    assert one == other
    assert report == other_report
    alone = copy.deepcopy(sft)
    options = {"alpha": "auto", "reset": Reset(fraction=0.1, rank_by="random")}
    expected = rejuvenate(alone, base, [greedy_batch(base, seed=10)], seed=0, **options)
    assert one == {n: p.detach().tolist() for n, p in alone.named_parameters()}
    assert report["alpha"] == expected.alpha
    assert report["comparison"]["entropy_after"] == expected.comparison.entropy_after


def test_stochastic_rounding_is_that_of_rank_zero_too(tmp_path):
    base = tiny_llama(dtype=torch.bfloat16)
    sft = shifted(base, 2e-4)

    def work(rank):
        model = copy.deepcopy(sft)
        wrapped = nn.parallel.DistributedDataParallel(model)
        rejuvenate(wrapped, base, alpha=0.5, rounding="stochastic", seed=rank)
        return {n: p.detach().float().tolist() for n, p in model.named_parameters()}

    one, other = run_in_processes(work, tmp_path)
    assert one == other


def test_what_rank_zero_refuses_all_processes_refuse(tmp_path):
    base = tiny_llama()
    sft = sharpened(base)

    def work(rank):
        model = copy.deepcopy(sft)
        wrapped = nn.parallel.DistributedDataParallel(model)
        data = [greedy_batch(base)] if rank else []
        with pytest.raises((ValueError, RuntimeError), match="iterable is empty"):
            rejuvenate(wrapped, base, data, alpha=0.5, reset=Reset(fraction=0.1))
        return all(torch.equal(p, q) for p, q in zip(model.parameters(), sft.parameters(), strict=True))

    assert run_in_processes(work, tmp_path) == [True, True]


def test_a_bare_module_is_planned_where_it_is(tmp_path):
    """One process alone may rejuvenate a model of its own: nothing waits for the others."""
    base = tiny_llama()
    sft = sharpened(base)
    options = {"alpha": 0.5, "reset": Reset(fraction=0.1)}

    def work(rank):
        if rank:
            return None
        return rejuvenate(copy.deepcopy(sft), base, _data(base), **options).summary()

    assert (
        run_in_processes(work, tmp_path)[0]
        == rejuvenate(copy.deepcopy(sft), base, _data(base), **options).summary()
    )
