"""Casts of the module around a measure never reach its sums: each is compared with its function on all batches."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_rejuv.metrics import PlasticityMonitor, RelativeDrift, TokenEntropy
from tests.conftest import batch, shifted, tiny_llama
from tests.metrics.cases import cases
from tests.metrics.test_monitor import clone_of

CASES = cases()
HALF = (torch.bfloat16, torch.float16)


def in_a_module(metric: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.metric = metric
    holder.inside = nn.ModuleList([nn.Linear(2, 2)])
    return holder


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "to_device_and_dtype": lambda m: m.to("cpu", torch.float16),
    "to_like": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.bfloat16),
    "set_dtype": lambda m: m.set_dtype(torch.bfloat16),
    "parent_to": lambda m: in_a_module(m).to(torch.bfloat16).metric,
    "parent_half": lambda m: in_a_module(m).half().metric,
    "grandparent": lambda m: in_a_module(in_a_module(m)).bfloat16().metric.metric,
    "apply": lambda m: m._apply(lambda t: t.bfloat16()),
    "cast_and_deepcopy": lambda m: copy.deepcopy(m.to(torch.bfloat16)),
    "cast_and_clone": lambda m: m.bfloat16().clone(),
    "cast_and_pickle": lambda m: pickle.loads(pickle.dumps(m.half())),
}


def check(name: str, metric) -> None:
    wide = (torch.float64, torch.int64)
    assert all(getattr(metric, state).dtype in wide for state in metric._defaults)
    assert all(default.dtype in wide for default in metric._defaults.values())
    value = metric.compute()
    assert value.dtype == torch.float32
    assert value.tolist() == pytest.approx(CASES[name].whole().tolist(), rel=1e-5, abs=1e-9)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a batch that is all padding
@pytest.mark.parametrize("name", CASES)
def test_every_cast_at_every_moment(name):
    costly = callable(CASES[name].batches[0][0])  # curvature: many backward passes an update
    for cast in [CASTS["to"], CASTS["parent_half"]] if costly else CASTS.values():
        metric = cast(CASES[name].make())
        for number, given in enumerate(CASES[name].batches):
            metric.update(*given)
            metric = cast(metric) if number == 1 else metric
        check(name, metric)
        check(name, cast(metric))  # the cached value stays, too
        metric.reset()
        for given in CASES[name].batches:
            metric(*given)
        check(name, cast(metric))


@contextmanager
def default_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("around", ["default dtype", "autocast"])
def test_sums_are_wide_under_autocast_and_another_default_dtype(name, around):
    with default_bfloat16() if around == "default dtype" else torch.autocast("cpu", torch.bfloat16):
        metric = CASES[name].make()
        for given in CASES[name].batches:
            metric.update(*given)
        metric.compute()
    check(name, metric)


def test_many_small_sums_do_not_stand_still():
    """In bfloat16 a sum stops growing at 256 times what is added."""
    metric = in_a_module(TokenEntropy()).to(torch.bfloat16).metric
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    log_p = logits.double().log_softmax(-1)
    for _ in range(600):
        metric.update(logits)
    assert metric.count.item() == 4200
    assert metric.compute().item() == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-6)


def test_a_checkpoint_that_was_cast_is_loaded_into_wide_states():
    metric = RelativeDrift()
    metric.persistent(True)
    metric.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    state = {name: value.bfloat16() for name, value in metric.state_dict().items()}
    other = RelativeDrift()
    other.persistent(True)
    other.load_state_dict(state)
    assert other.difference.dtype == other.base.dtype == torch.float64
    assert other.base.item() == 18.0
    other.update(torch.tensor([1.0]), torch.tensor([2.0**-10]))
    assert other.base.item() == 18 + 2.0**-20


def test_a_collection_is_cast_without_its_states():
    collection = MetricCollection({"a": TokenEntropy(), "b": RelativeDrift()}, compute_groups=False)
    for cast in (collection.bfloat16(), collection.set_dtype(torch.half), collection.clone().half()):
        assert cast["a"].total.dtype == cast["b"].base.dtype == torch.float64


def test_states_still_move_to_another_device():
    metric = TokenEntropy().to("meta")
    assert (metric.total.device.type, metric.total.dtype, metric.device.type) == (
        "meta",
        torch.float64,
        "meta",
    )
    metric = TokenEntropy().to("meta", torch.bfloat16)
    assert (metric.total.device.type, metric.total.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize("dtype", HALF)
def test_a_monitor_that_is_an_attribute_of_a_cast_module(dtype):
    """States that are made at the first measurement, after the cast, and those that were there before."""
    base, probe = tiny_llama(), [batch(seed=n) for n in range(4)]
    model = shifted(base, 0.1).to(dtype)

    def monitor():
        return PlasticityMonitor(clone_of(base), probe=probe, base_samples=probe, tau=0.5, pass_at=(1,))

    rewards = (torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    alone, held = monitor(), monitor()
    holder = in_a_module(held).to(dtype)
    for found in (alone, held):
        found.measure(model)
        found.update(rewards)
    expected, before = alone.compute(), held.compute()
    assert before == expected
    holder.bfloat16()
    assert held.compute() == expected
    held.measure(model)
    assert held.compute() == expected
    assert held.layer_values() == alone.layer_values()
    with default_bfloat16():
        inside = monitor()
        inside.measure(model)
        inside.update(rewards)
        values = inside.compute()
    assert {name: value.dtype for name, value in values.items()} == dict.fromkeys(values, torch.float32)
    for name, value in values.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-6), name
