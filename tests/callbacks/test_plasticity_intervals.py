"""What one measurement of the plasticity callback has to do with the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.metrics import PlasticityMonitor
from tests.callbacks.modules import Line
from tests.callbacks.test_distributed import _fit_two, in_two_ranks
from tests.callbacks.test_logging import Rejuvenation
from tests.callbacks.test_plasticity import Module, fit, monitor, rows_of
from tests.conftest import tiny_llama


def test_an_interval_counts_its_own_rollouts_alone(tmp_path):
    """Four batches in which nothing is solved, then two in which all is."""

    class Learning(Module):
        def training_step(self, rows, batch_idx):
            out = super().training_step(rows, batch_idx)
            return {**out, "rewards": torch.full((2, 2), float(batch_idx >= 4))}

    logger = CSVLogger(tmp_path)
    watched = PlasticityMonitor(pass_at=(1, 2), sites=None, rank_sites=None)
    fit([PlasticityCallback(watched, 100)], Learning(), logger, log_every_n_steps=4)
    assert rows_of(logger, "plasticity/pass_at_1") == [(3, 0.0), (6, 1.0)]


@pytest.mark.filterwarnings("ignore:Token entropy fell:UserWarning")
@pytest.mark.parametrize("rejuvenated", [True, False])
def test_the_alarms_begin_again_with_a_rejuvenated_model(tmp_path, rejuvenated):
    """Its entropy is another: what RL starts from is the edited model. Edited before the fourth of 24 steps."""
    logger = CSVLogger(tmp_path)
    watched = PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    callbacks = [PlasticityCallback(watched), *([Rejuvenation()] if rejuvenated else [])]
    fit(callbacks, Module(True, [1.0, 1.0, 1.0, 0.4]), logger, max_epochs=4)
    alarms = {path.stem for path in (Path(logger.log_dir) / "plasticity" / "alarm").glob("*.txt")}
    assert alarms == (set() if rejuvenated else {"entropy_fall"})


def test_the_probe_is_measured_in_the_precision_of_training(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([PlasticityCallback(monitor(), 100, figure_every_n_steps=0)], logger=logger, precision="bf16-mixed")
    exact = float(monitor().measure(tiny_llama())["token_entropy"])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = float(monitor().measure(tiny_llama())["token_entropy"])
    assert mixed != pytest.approx(exact, rel=1e-5)
    step, found = rows_of(logger, "plasticity/token_entropy")[0]
    assert (step, found) == (0, pytest.approx(mixed, rel=1e-5))


@pytest.mark.parametrize(("interval", "share"), [(4, 1.0), (3, 2 / 3), (100, 1 / 3)])
def test_the_verdict_after_a_fit_goes_by_the_rollouts_logged_last(interval, share, monkeypatch):
    """Six batches, of which the last two are all right: the windows that end the fit have two, three and six."""

    class Learning(Module):
        def training_step(self, rows, batch_idx):
            out = super().training_step(rows, batch_idx)
            return {**out, "rewards": torch.full((2, 2), float(batch_idx >= 4))}

    watched = PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
    fit([PlasticityCallback(watched, 100)], Learning(), log_every_n_steps=interval)
    judged = []
    monkeypatch.setattr("lightning_rejuv.metrics.monitor.judge", lambda values, base: judged.append(values))
    watched.verdict()
    assert judged[0]["pass_at_1"] == pytest.approx(share)
    assert judged[0]["rollout_groups"] == 2 * {4: 2, 3: 3, 100: 6}[interval]


def test_rollouts_of_before_a_rejuvenation_say_nothing_of_the_edited_model(tmp_path):
    """Edited before the fourth batch, in the middle of a window: nothing is solved before, all after."""

    class Solved(Module):
        def training_step(self, rows, batch_idx):
            out = super().training_step(rows, batch_idx)
            return {**out, "rewards": torch.full((2, 2), float(batch_idx >= 3))}

    class Verdicts(Callback):
        seen: list[str] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                self.seen.append(watched.verdict().level)

    logger = CSVLogger(tmp_path)
    watched = PlasticityMonitor(pass_at=(1, 2), sites=None, rank_sites=None)
    verdicts = Verdicts()
    fit([PlasticityCallback(watched, 100), Rejuvenation(), verdicts], Solved(), logger, log_every_n_steps=4)
    assert verdicts.seen == ["unknown"]
    assert rows_of(logger, "plasticity/pass_at_1") == [(3, 0.0), (3, 1.0), (6, 1.0)]


def test_the_verdict_after_a_fit_of_two_ranks_counts_the_rollouts_of_both(tmp_path, monkeypatch):
    """Four batches in each of two epochs, one logging interval: rank 0 has one group each time, rank 1 three."""

    class Rewarded(Line):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {
                "loss": loss,
                "rewards": torch.full((1 + 2 * self.global_rank, 2), float(self.global_rank)),
            }

    judged = []
    monkeypatch.setattr("lightning_rejuv.metrics.monitor.judge", lambda values, base: judged.append(values))

    def work():
        watched = PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
        module = Rewarded()
        _fit_two(module, tmp_path, PlasticityCallback(watched))
        watched.verdict()
        return judged[-1], module.trainer.global_step

    for found, error in in_two_ranks(work).values():
        assert error is None
        values, steps = found
        assert values["rollout_groups"] == 4 * steps
        assert (values["pass_at_1"], values["zero_variance_fraction"]) == (0.75, 1.0)
