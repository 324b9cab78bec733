"""Plots of a monitor and of each measure: of what was measured, of a part of it, of nothing."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from lightning_rejuv.metrics import PlasticityMonitor
from tests.conftest import batch
from tests.metrics.cases import cases
from tests.metrics.test_monitor import clone_of

plt = pytest.importorskip("matplotlib.pyplot")
CASES = cases()


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def shown(axes) -> list[float]:
    return [float(y) for line in axes.get_lines() for y in line.get_ydata()]


def test_a_monitor_that_has_measured_nothing():
    monitor = PlasticityMonitor(pass_at=(1,))
    with pytest.warns(UserWarning, match="nothing to plot"):
        assert monitor.plot() == []
    with pytest.warns(UserWarning, match="nothing to plot"):
        figure, axes = monitor.plot(together=True)
    assert figure is not None
    assert not axes.get_lines()
    with pytest.warns(UserWarning, match="nothing to plot"):
        assert monitor.plot([]) == []


@pytest.mark.parametrize("prefix", [None, "val_"])
def test_what_was_measured_is_plotted(llama, tuned, prefix):
    monitor = PlasticityMonitor(clone_of(llama), probe=[batch()], base_samples=[batch()], prefix=prefix)
    monitor.measure(tuned)
    values = monitor.compute()
    plots = monitor.plot()
    assert [axes.get_ylabel() for _, axes in plots] == list(values)
    assert len({id(figure) for figure, _ in plots}) == len(values)
    for (_, axes), value in zip(plots, values.values(), strict=True):
        assert shown(axes) == pytest.approx([value.item()])
    low, high = dict(zip(values, plots, strict=True))[f"{prefix or ''}top1_confidence"][1].get_ylim()
    assert low < 0 < 1 < high  # the bounds of the metric
    _, axes = monitor.plot(together=True)
    assert shown(axes) == pytest.approx([value.item() for value in values.values()])


def test_a_series_of_steps_with_gaps():
    monitor = PlasticityMonitor(pass_at=(1,))
    steps = [{"a": torch.tensor(1.0)}, {"a": 2.0, "b": torch.tensor(5.0)}, {"b": torch.tensor(6.0)}]
    (_, first), (_, second) = monitor.plot(steps)
    assert shown(first) == pytest.approx([1.0, 2.0, math.nan], nan_ok=True)
    assert shown(second) == pytest.approx([math.nan, 5.0, 6.0], nan_ok=True)
    _, axes = monitor.plot(steps, together=True)
    assert shown(axes) == pytest.approx([1.0, 2.0, math.nan, math.nan, 5.0, 6.0], nan_ok=True)
    assert shown(monitor.plot(steps[:1])[0][1]) == [1.0]


def test_given_axes():
    monitor = PlasticityMonitor(pass_at=(1,))
    monitor.update(torch.tensor([[0.0, 1.0]]))
    _, axes = plt.subplots(2)
    monitor.plot(ax=list(axes))
    assert [ax.get_ylabel() for ax in axes] == ["pass_at_1", "zero_variance_fraction"]
    _, one = plt.subplots()
    assert monitor.plot(ax=one, together=True)[1] is one
    for wrong in (one, [one]):
        with pytest.raises(
            ValueError, match=r"`ax` to be a sequence of 2 axes, of \['pass_at_1', .* but got"
        ):
            monitor.plot(ax=wrong)


@pytest.mark.parametrize("name", CASES)
def test_a_measure_that_was_never_updated_and_one_over_steps(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure, axes = CASES[name].make().plot()
    assert figure is not None
    assert all(math.isnan(y) for y in shown(axes))
    metric = CASES[name].make()
    metric.update(*CASES[name].batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        value = metric.compute()
    figure, axes = metric.plot([value, value])
    assert len(shown(axes)) == 2 * value.numel()
