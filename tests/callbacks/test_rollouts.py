"""Rewards and entropy that a training step returns: as numbers of any kind, and what is none of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_rejuv.callbacks._rollouts import Rollouts
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.metrics import PlasticityMonitor
from tests.callbacks.test_plasticity import Module, fit, monitor, rows_of


@pytest.mark.parametrize(
    "rewards",
    [
        torch.ones(8),
        torch.ones(3, 1),
        torch.ones(2, 2, 2),
        torch.tensor([[1.0, float("nan")]]),
        torch.ones(0, 2),
        0.5,
        numpy.ones(8),
        numpy.array([["a", "b"]]),
        [1.0, 0.0],
        [[1.0, 0.0], [1.0]],
        [["good", "bad"]],
        {"mean": 0.5},
        "good",
    ],
)
def test_rewards_of_another_shape_are_left_out_with_one_hint(rewards, tmp_path):
    class Own(Module):
        def training_step(self, rows, batch_idx):
            return {**super().training_step(rows, batch_idx), "rewards": rewards, "entropy": torch.ones(3)}

    def fitted(module, *callbacks, logger=False):
        fit(callbacks, module, logger)
        return module.state_dict()

    logger = CSVLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = fitted(Own(), PlasticityCallback(monitor(), 2), logger=logger)
    hints = [str(w.message) for w in caught if "rollouts are left out" in str(w.message)]
    assert len(hints) == 1
    assert "`rewards.view(prompts, group)`" in hints[0]
    assert rows_of(logger, "plasticity/relative_drift")
    alone = fitted(Own())
    assert all(torch.equal(alone[name], weights) for name, weights in seen.items())


def left_out(rewards, entropy, monitor):
    """What was hinted at, by its beginning, in a fit whose steps return this."""

    class Own(Module):
        def training_step(self, rows, batch_idx):
            return {**super().training_step(rows, batch_idx), "rewards": rewards, "entropy": entropy}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([PlasticityCallback(monitor)], Own())
    return [text.split(":")[0] for w in caught if "left out of" in (text := str(w.message))]


ROLLOUTS = [[0.0, 1.0, 1.0], [0.5000000001, 0.5, 0.25]]


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor(ROLLOUTS, dtype=torch.float64),
        ROLLOUTS,  # float32 would lose what is just above the threshold
        tuple(map(tuple, ROLLOUTS)),
        numpy.array(ROLLOUTS),
        numpy.array(ROLLOUTS)[::-1],
        [numpy.array(row) for row in ROLLOUTS],
        [torch.tensor(row, dtype=torch.float64) for row in ROLLOUTS],
        [[torch.tensor(value, dtype=torch.float64) for value in row] for row in ROLLOUTS],
        [[numpy.float64(value) for value in row] for row in ROLLOUTS],
        [[0, 1, 1], [True, False, 0.25]],
        numpy.array([[False, True, True], [False, False, True]]),
    ],
)
def test_rewards_may_be_numbers_of_any_kind(rewards, monkeypatch):
    watched = PlasticityMonitor(pass_at=(1, 2), sites=None, rank_sites=None)
    assert left_out(rewards, None, watched) == []
    judged = []
    monkeypatch.setattr("lightning_rejuv.metrics.monitor.judge", lambda values, base: judged.append(values))
    watched.verdict()
    assert judged[0]["pass_at_1"] == pytest.approx(0.5)
    assert judged[0]["pass_at_2"] == pytest.approx(5 / 6)


def test_no_rewards_are_nothing_to_hint_at():
    watched = PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    assert left_out(None, torch.ones(3), watched) == []


@pytest.mark.filterwarnings("ignore:Token entropy fell:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [
        float,
        lambda value: round(10 * value),
        numpy.float32,
        numpy.float16,
        numpy.array,
        lambda value: numpy.array([value]),
        lambda value: [value],
        torch.tensor,
        lambda value: torch.tensor([[value]], dtype=torch.bfloat16),
    ],
)
def test_entropy_may_be_a_number_of_any_kind(kind, tmp_path):
    class Own(Module):
        def training_step(self, rows, batch_idx):
            return {**super().training_step(rows, batch_idx), "entropy": kind(0.1 if batch_idx else 0.5)}

    logger = CSVLogger(tmp_path)
    watched = PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    fit([PlasticityCallback(watched)], Own(rewards=True), logger)
    assert (Path(logger.log_dir) / "plasticity" / "alarm" / "entropy_fall.txt").exists()


@pytest.mark.parametrize(
    "entropy", [torch.ones(3), [0.5, 0.4], numpy.ones((2, 2)), "0.5", {"mean": 0.5}, True, 1j, torch.ones(0)]
)
def test_an_entropy_that_is_no_number_is_left_out_with_one_hint(entropy):
    watched = PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    assert left_out(ROLLOUTS, entropy, watched) == ["The entropy of the rollouts is left out of the alarms"]


def test_only_rewards_that_could_be_used_are_seen():
    rollouts, watched = Rollouts(), PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    with pytest.warns(UserWarning, match="The rollouts are left out"):
        assert rollouts.take({"rewards": torch.ones(8), "entropy": 1.0}, watched) is None
    assert rollouts.take({"entropy": 1.0}, watched) is None
    assert not rollouts.seen
    assert rollouts.take({"rewards": torch.ones(2, 4), "entropy": 0.5}, watched) == 0.5
    assert rollouts.seen


def test_rewards_and_entropy_have_a_hint_each():
    rollouts, watched = Rollouts(), PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for rewards in (torch.ones(8), torch.ones(2, 4)):
                assert rollouts.take({"rewards": rewards, "entropy": torch.ones(3)}, watched) is None
    hints = [str(w.message).partition(" left out")[0] for w in caught]
    assert hints == ["The rollouts are", "The entropy of the rollouts is"]
