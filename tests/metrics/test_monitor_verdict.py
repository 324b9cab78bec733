"""The monitor's verdict: what it is judged by, which rollouts count, and on how many ranks."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.metrics import PlasticityMonitor, monitor
from tests.conftest import batch, tiny_llama
from tests.metrics.test_monitor import clone_of
from tests.processes import run_in_processes


def test_an_over_confident_model_of_the_monitor():
    base = tiny_llama()
    model = tiny_llama()
    model.get_output_embeddings().weight.data.mul_(60)
    monitor = PlasticityMonitor(anchor=clone_of(base), probe=[batch()], base_samples=[batch()])
    monitor.measure(model)
    assert monitor.verdict().level == "over-confident"
    reasons = monitor.verdict().reasons
    assert [reason.measure for reason in reasons] == ["token_entropy", "token_nll"]
    assert {reason.level for reason in reasons} == {
        "over-confident"
    }  # sure, and of what the probe does not say
    assert PlasticityMonitor().verdict().level == "unknown"


@pytest.mark.parametrize(
    ("rewards", "level"),
    [
        ([[1.0] * 8, [0.0] * 8] * 4, "over-confident"),
        ([[1.0, 0.0] * 4, [0.0, 0.0, 1.0, 0.0] * 2] * 4, "healthy"),
        ([[0.0] * 8] * 8, "cannot start"),
    ],
)
def test_rollouts_come_before_the_entropy_of_the_monitor(rewards, level):
    base = tiny_llama()
    monitor = PlasticityMonitor(anchor=clone_of(base), probe=[batch()])
    monitor.measure(base)
    assert (
        monitor.verdict().level == "unknown"
    )  # its entropy is the base's, which says nothing of its rollouts
    monitor.update(torch.tensor(rewards))
    found = monitor.verdict()
    assert (found.level, found.reasons[0].measure) == (level, "pass_at_8")


@pytest.fixture
def judged(monkeypatch):
    """What ``judge`` is given: the newest values last."""
    seen = []
    judge = monitor.judge
    monkeypatch.setattr(monitor, "judge", lambda values, base: seen.append(values) or judge(values, base))
    return seen


def rollouts(right: int, groups: int) -> torch.Tensor:
    """Groups of eight: so many all right, the others all wrong."""
    return (torch.arange(groups) < right).float()[:, None].expand(groups, 8)


@pytest.mark.parametrize(("right", "groups"), [(9, 10), (27, 30), (1, 20), (2, 40), (1, 3)])
def test_the_verdict_has_exact_values_at_limits(right, groups, judged):
    """27 of 30 is 0.9; float32 makes it 0.89999998."""
    measured = PlasticityMonitor()
    measured.update(rollouts(right, groups))
    measured.verdict()
    share = round(right / groups, 12)
    assert judged[-1] == {
        "pass_at_1": share,
        "pass_at_8": share,
        "zero_variance_fraction": 1.0,
        "rollout_groups": groups,
    }


def test_sums_of_pass_at_k_do_not_miss_a_limit_by_their_last_bit(judged):
    """Of ten samples one right: pass@8 is 0.8, and with as many groups that are all right 0.9."""
    measured = PlasticityMonitor()
    one_of_ten = torch.eye(10)[:1].expand(15, 10)
    measured.update(torch.cat([one_of_ten, torch.ones(15, 10)]))
    measured.verdict()
    assert judged[-1]["pass_at_8"] == 0.9


def test_the_verdict_goes_by_the_last_closed_window_until_rollouts_come_in(judged):
    measured = PlasticityMonitor()
    assert measured.close_rollouts() == {}
    measured.update(rollouts(3, 4))
    closed = measured.close_rollouts()
    assert closed["pass_at_8"].item() == 0.75
    assert measured.compute() == {}  # the next window has begun
    measured.verdict()
    assert (judged[-1]["pass_at_8"], judged[-1]["rollout_groups"]) == (0.75, 4)
    assert measured.close_rollouts() == {}  # a window without rollouts closes none
    measured.verdict()
    assert judged[-1]["pass_at_8"] == 0.75
    measured.update(rollouts(1, 2))
    measured.verdict()
    assert (judged[-1]["pass_at_8"], judged[-1]["rollout_groups"]) == (0.5, 2)


@pytest.mark.parametrize("forget", ["reset", "reset_rollouts"])
def test_a_closed_window_is_forgotten_with_the_rollouts(forget, judged):
    measured = PlasticityMonitor()
    measured.update(rollouts(3, 4))
    measured.close_rollouts()
    measured.reset_model()
    measured.verdict()
    assert judged[-1]["rollout_groups"] == 4
    getattr(measured, forget)()
    assert measured.verdict().level == "unknown"
    assert judged[-1] == {}


def test_groups_are_those_of_the_measure_that_has_the_fewest(judged):
    measured = PlasticityMonitor()
    measured.update(rollouts(1, 2))
    with pytest.warns(UserWarning, match="pass_at_8 is left out"):
        measured.update(torch.ones(5, 4))
    measured.verdict()
    assert judged[-1]["rollout_groups"] == 2
    assert judged[-1]["pass_at_1"] == pytest.approx(6 / 7)


@pytest.mark.parametrize("closed", [True, False])
def test_the_verdict_counts_the_groups_of_all_ranks(closed, judged, tmp_path):
    def work(rank):
        measured = PlasticityMonitor()
        measured.update(rollouts(27, 29) if rank == 0 else rollouts(0, 1))
        if closed:
            measured.close_rollouts()
        measured.verdict()
        return judged[-1]

    share = {"pass_at_1": 0.9, "pass_at_8": 0.9, "zero_variance_fraction": 1.0, "rollout_groups": 30}
    assert run_in_processes(work, tmp_path) == [share] * 2


def test_newer_rollouts_of_one_rank_are_newer_on_all(judged, tmp_path):
    def work(rank):
        measured = PlasticityMonitor()
        measured.update(rollouts(3, 4))
        measured.close_rollouts()
        if rank == 0:
            measured.update(rollouts(1, 2))
        measured.verdict()
        return judged[-1]

    newer = {"pass_at_1": 0.5, "pass_at_8": 0.5, "zero_variance_fraction": 1.0, "rollout_groups": 2}
    assert run_in_processes(work, tmp_path) == [newer] * 2
