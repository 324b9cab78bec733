"""What the plasticity callback writes: TensorBoard, files beside metrics.csv, the event of a rejuvenation."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from tests.callbacks.test_plasticity import fit, monitor, rows_of
from tests.conftest import shifted, tiny_llama


class Rejuvenation(Callback):
    """Edits the weights as RejuvenationCallback does, and tells who wants to know."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != 3:
            return
        listeners = [c for c in trainer.callbacks if hasattr(c, "on_rejuvenation")]
        for listener in listeners:
            listener.on_before_rejuvenation(trainer, pl_module)
        with torch.no_grad():
            for p, other in zip(
                pl_module.model.parameters(), shifted(tiny_llama()).parameters(), strict=True
            ):
                p.lerp_(other, 0.5)
        for listener in listeners:
            listener.on_rejuvenation(trainer, pl_module, "alpha 0.5")


@pytest.mark.parametrize("first", [True, False])
def test_a_rejuvenation_shows_as_a_jump_an_event_and_a_figure(tmp_path, first):
    logger = CSVLogger(tmp_path)
    callbacks = [PlasticityCallback(monitor(), 2), Rejuvenation()]
    fit(callbacks if first else callbacks[::-1], logger=logger)
    drift = rows_of(logger, "plasticity/relative_drift")
    assert [step for step, _ in drift] == [0, 2, 3, 3, 4, 6]
    assert drift[2][1] != drift[3][1]  # one step, two values: the curve jumps
    assert [v for _, v in rows_of(logger, "plasticity/rejuvenated")] == [0, 0, 0, 1, 1, 1]
    here = Path(logger.log_dir)
    assert "before step 3: alpha 0.5" in (here / "plasticity/rejuvenated.txt").read_text()
    assert (here / "plasticity_map/rejuvenation/step_0000003.png").exists()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    callback = PlasticityCallback(
        monitor(), 2, figure_every_n_steps=4, per_layer=True, custom_layout=True, track_updates=True
    )
    fit([callback], logger=logger)
    tags = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0})
    tags.Reload()
    scalars, images = set(tags.Tags()["scalars"]), set(tags.Tags()["images"])
    assert {"plasticity/token_entropy", "plasticity/update_ratio", "plasticity/rejuvenated"} <= scalars
    assert "plasticity_layers.relative_drift/model.layers.0.self_attn.q_proj.weight" in scalars
    assert {
        f"plasticity_map/{m}" for m in ("relative_drift", "dormancy_score_low", "gradient_dormancy")
    } <= images
    assert [e.step for e in tags.Images("plasticity_map/relative_drift")] == [4, 6]
    assert "plasticity_scores/model.layers.1.mlp.down_proj" in tags.Tags()["histograms"]
    assert {"custom_scalars__config__", "plasticity/probe/text_summary"} <= set(tags.Tags()["tensors"])


def test_without_a_logger_it_goes_on_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr("lightning_rejuv.loggers._told", set())
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        _, trainer = fit([PlasticityCallback(monitor(), 2)])
    assert trainer.callback_metrics["plasticity/relative_drift"] > 0
    assert caplog.text.count("There is no logger") == 1
