"""One conformance suite over every metric: class = function = split over batches = two processes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torchmetrics import Metric

from lightning_rejuv import functional, metrics
from tests.metrics.cases import cases
from tests.processes import run_in_processes

CASES = cases()
EMPTY = [
    name for name, case in CASES.items() if len(case.batches[2]) > 1 and not callable(case.batches[2][0])
]
EMPTY = [name for name in EMPTY if name not in ("RelativeDrift", "DriftSparsity", "UpdateRatio")]


def test_every_metric_and_every_functional_is_covered():
    public = set(metrics.__all__) - {"PlasticityMonitor", "Verdict", "judge"}
    assert public == set(CASES)
    without = {"response_mask", "dormancy_scores"}  # helpers of others
    snake = {"".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_") for name in CASES}
    snake = {{"s_rank": "srank", "pass_at_k": "pass_at_k"}.get(s, s) for s in snake}
    assert {f for f in functional.__all__ if f not in without} == snake


@pytest.mark.parametrize("name", CASES)
def test_split_over_batches_is_the_whole(name):
    case = CASES[name]
    metric = case.make()
    for batch in case.batches:
        metric.update(*batch)
    assert metric.compute().tolist() == pytest.approx(case.whole().tolist(), rel=1e-5, abs=1e-9)
    assert metric.compute().dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_the_whole(name, tmp_path):
    case = CASES[name]

    def work(rank):
        metric = case.make()
        for batch in case.batches[:3] if rank == 0 else case.batches[3:]:  # three batches against one
            metric.update(*batch)
        return metric.compute().tolist()

    first, second = run_in_processes(work, tmp_path)
    assert first == second
    assert first == pytest.approx(case.whole().tolist(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_forward_gives_the_batch_and_accumulates(name):
    case = CASES[name]
    metric, alone = case.make(), case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a batch of 5 features in 2 rows
        for batch in case.batches:
            value = metric(*batch)
        alone.update(*case.batches[-1])
        assert value.tolist() == pytest.approx(alone.compute().tolist(), rel=1e-6, abs=1e-12)
    assert metric.compute().tolist() == pytest.approx(case.whole().tolist(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_lifecycle(name):
    case = CASES[name]
    metric = case.make()
    assert isinstance(metric, Metric)
    assert metric.state_dict() == {}
    assert not list(metric.parameters())
    assert metric.is_differentiable is False
    assert metric.full_state_update is False
    for batch in case.batches:
        metric.update(*batch)
    value = metric.compute()
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert twin.compute().tolist() == value.tolist()
    metric.reset()
    assert not metric.update_called
    for batch in case.batches:
        metric.update(*batch)
    assert metric.compute().tolist() == value.tolist()


@pytest.mark.parametrize("name", CASES)
def test_never_updated_is_nan_and_a_warning(name):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.isnan(CASES[name].make().compute()).all()


@pytest.mark.parametrize("name", EMPTY)
def test_only_padding_is_nan_and_a_warning(name):
    metric = CASES[name].make()
    metric.update(*CASES[name].batches[2])
    with pytest.warns(UserWarning, match=f"{name} is NaN: its updates held nothing to measure"):
        assert torch.isnan(metric.compute()).all()


@pytest.mark.parametrize("name", [n for n in EMPTY if n != "SupportRetention"])
def test_bfloat16_input(name):
    case = CASES[name]
    low, high = case.make(), case.make()
    for batch in case.batches:
        rounded = [t.bfloat16() if t.is_floating_point() else t for t in batch]
        low.update(*rounded)
        high.update(*[t.double() if t.is_floating_point() else t for t in rounded])
    assert low.compute().tolist() == pytest.approx(high.compute().tolist(), rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_plot(name):
    case = CASES[name]
    metric = case.make()
    for batch in case.batches:
        metric.update(*batch)
    figure, axes = metric.plot()
    assert figure is not None
    assert axes.has_data()
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")


def test_wrong_widths_are_named():
    for metric, value in (
        (metrics.EffectiveRank(4), torch.zeros(3, 5)),
        (metrics.DormantFraction(4), torch.zeros(3, 5)),
        (metrics.GradientDormancy(4), torch.zeros(3, 5)),
    ):
        with pytest.raises(ValueError, match=r"4 .*but got [35]"):
            metric.update(value)
    with pytest.raises(ValueError, match="k = 9 samples a prompt but got 8"):
        metrics.PassAtK(9).update(torch.zeros(2, 8))


def test_strict_ranks_raise_at_compute():
    metric = metrics.EffectiveRank(8, strict=True)
    metric.update(torch.randn(3, 8))
    with pytest.raises(ValueError, match="3 rows of 8 features"):
        metric.compute()
    metric.update(torch.randn(30, 8))
    assert math.isfinite(metric.compute())


def test_a_diverged_model_gives_nan_and_no_error():
    metric = metrics.TokenEntropy()
    metric.update(torch.full((2, 3), math.nan))
    assert metric.compute().isnan()
    rank = metrics.EffectiveRank(3)
    rank.update(torch.full((4, 3), math.nan))
    assert rank.compute().isnan()
    dormant = metrics.DormantFraction(3)
    dormant.update(torch.full((4, 3), math.nan))
    assert dormant.compute().isnan()


def test_counts_do_not_saturate():
    # float32 counters stop at 2**24 tokens.
    metric = metrics.ActiveFraction(1)
    metric.update(torch.ones(1, 1))
    metric.table *= 2.0**24
    metric.update(torch.zeros(4, 1))
    assert metric.compute().item() == pytest.approx(2**24 / (2**24 + 4), rel=1e-7)
    assert metric.table[-1, 0].item() == 2**24 + 4


@pytest.mark.parametrize("name", EMPTY)
def test_before_the_first_update_nothing_is_said_of_updates(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CASES[name].make().compute()
    assert not [w for w in caught if "its updates held nothing" in str(w.message)]
