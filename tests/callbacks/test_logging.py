"""What the plasticity callback writes: TensorBoard, files beside metrics.csv, the event of a rejuvenation."""

from __future__ import annotations

import logging
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.rank_zero import WarningCache
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_rejuv.callbacks import _logging
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.metrics import PlasticityMonitor
from tests.callbacks.test_plasticity import PROBE, Module, fit, monitor, rows_of
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


@pytest.mark.parametrize(
    ("options", "rewards", "charts"),
    [
        ({"probe": PROBE}, False, {"entropy", "rank"}),
        ({"anchor": "base"}, False, {"drift"}),
        ({"anchor": "base"}, True, {"drift", "rollouts"}),
    ],
)
def test_a_chart_of_the_layout_has_data_beside_the_step_of_the_rejuvenation(
    tmp_path, options, rewards, charts
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    if "anchor" in options:
        options = {"anchor": Module().model.state_dict(), "sites": None, "rank_sites": None}
    logger = TensorBoardLogger(tmp_path)
    watched = PlasticityMonitor(**options, pass_at=(1, 2))
    callback = PlasticityCallback(watched, 2, figure_every_n_steps=0, custom_layout=True)
    fit([callback, Rejuvenation()], Module(rewards), logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    written = [
        Layout.FromString(e.tensor_proto.string_val[0]) for e in events.Tensors("custom_scalars__config__")
    ]
    titles = [[chart.title for category in layout.category for chart in category.chart] for layout in written]
    assert set(titles[-1]) == charts  # TensorBoard takes the last one
    assert all(len(a) < len(b) for a, b in pairwise(titles))
    for category in written[-1].category:
        for chart in category.chart:
            *measures, event = chart.multiline.tag
            assert any(re.match(tag, name) for tag in measures for name in events.Tags()["scalars"])
            assert re.match(event, "plasticity/rejuvenated")
    assert {e.value for e in events.Scalars("plasticity/rejuvenated")} == {0.0, 1.0}


def test_without_a_logger_it_goes_on_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr("lightning_rejuv.loggers._told", WarningCache())
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        _, trainer = fit([PlasticityCallback(monitor(), 2)])
    assert trainer.callback_metrics["plasticity/relative_drift"] > 0
    assert caplog.text.count("There is no logger") == 1


def test_a_measure_with_one_place_has_no_map(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger])
    values = {"layers.0.a": 0.5, "layers.1.a": 0.25}
    _logging.log_maps(trainer, {"two": values, "one": {"layers.0.a": 0.5}, "none": {}}, 3)
    found = [path.relative_to(logger.log_dir).as_posix() for path in Path(logger.log_dir).rglob("*.png")]
    assert found == ["plasticity_map/two/step_0000003.png"]


@pytest.fixture
def layouts(monkeypatch):
    """The titles of the charts, each time that a layout is written."""
    written = []
    monkeypatch.setattr(
        _logging, "log_layout", lambda _, layout: written.append([*layout.get("plasticity", {})])
    )
    return written


def test_a_layout_is_written_only_when_a_curve_changes_it(layouts):
    charts, trainer = _logging.ChartLayout(), SimpleNamespace(loggers=[])
    for names in (
        ["plasticity/rejuvenated"],  # on its own in no chart
        ["plasticity/token_entropy"],
        ["plasticity/entropy_gap", "plasticity/token_entropy"],  # in the chart that is there
        ["plasticity/token_nll"],  # in no chart
        ["plasticity/relative_drift"],
    ):
        charts.add(trainer, names)
    assert layouts == [["entropy"], ["entropy", "drift"]]


@pytest.mark.parametrize("asked", [False, True])
def test_no_layout_is_written_unasked(asked, layouts):
    watched = PlasticityMonitor(Module().model.state_dict(), sites=None, rank_sites=None)
    callback = PlasticityCallback(watched, 9, figure_every_n_steps=0, per_layer=True, custom_layout=asked)
    fit([callback], data=4)
    assert bool(layouts) == asked


def test_a_step_after_a_rejuvenation_is_recorded_once():
    """The callback is told of it before its own hook at the batch's start, and is to hook the model once."""
    hooks = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hooks.append(
                sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.model.modules())
            )

    callback = PlasticityCallback(PlasticityMonitor(), 1, figure_every_n_steps=0)
    fit([Rejuvenation(), callback, Count()], data=20)
    assert hooks == 5 * hooks[:1] != [0] * 5
