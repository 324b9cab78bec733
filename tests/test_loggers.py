from __future__ import annotations

import warnings

import pytest
import torch
from lightning.fabric.utilities.rank_zero import WarningCache
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_rejuv import loggers
from lightning_rejuv.loggers import (
    log_figure,
    log_histogram,
    log_layout,
    log_scalars,
    log_text,
    takes_figures,
)
from lightning_rejuv.plots import heat_map


@pytest.fixture
def figure():
    return heat_map({"layers.0.a": 0.5, "layers.1.a": 0.25}, "active_fraction")


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(loggers, "_told", WarningCache())


def events(logger):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.save()
    logger.experiment.flush()
    found = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0, "histograms": 0})
    found.Reload()
    return found


class Other(Logger):
    """A logger that this package has never heard of, with a separator of its own."""

    group_separator = "-"
    name, version = "other", 0

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((metrics, step))

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_tensorboard(tmp_path, figure):
    logger = TensorBoardLogger(tmp_path)
    log_scalars([logger], {"a/x": torch.tensor(0.5), "a/y": 2}, 3)
    log_figure([logger], "a/map", figure, 3)
    log_text([logger], "a/event", "two\nlines", 3)
    log_histogram([logger], "a/h", torch.arange(5), 3)
    log_layout([logger], {"a": {"b": ["Multiline", ["a/.*"]]}})
    found = events(logger)
    assert [(e.step, e.value) for e in found.Scalars("a/x")] == [(3, 0.5)]
    image = found.Images("a/map")[0]
    assert (image.step, image.encoded_image_string[:4]) == (3, b"\x89PNG")
    assert b"two  \nlines" in found.Tensors("a/event/text_summary")[0].tensor_proto.string_val[0]
    assert found.Histograms("a/h")[0].histogram_value.num == 5
    assert b"a/.*" in found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]


def test_csv_writes_files_beside_the_metrics(tmp_path, figure):
    logger = CSVLogger(tmp_path)
    log_scalars([logger], {"a/x": 1.0}, 3)
    log_figure([logger], "a/map", figure, 3)
    log_text([logger], "a/event", "first", 3)
    log_text([logger], "a/event", "second", 4)
    log_histogram([logger], "a/h", torch.arange(5), 3)
    logger.save()
    from pathlib import Path

    here = Path(logger.log_dir)
    assert (here / "metrics.csv").read_text().splitlines() == ["a/x,step", "1.0,3"]
    assert (here / "a/map/step_0000003.png").read_bytes().startswith(b"\x89PNG")
    assert (here / "a/event.txt").read_text() == "step 3\nfirst\n\nstep 4\nsecond\n\n"


def test_wandb_and_mlflow_are_called_as_they_want_it(figure):
    calls = []

    class Wandb(WandbLogger):
        def __init__(self):
            pass

        def log_image(self, key, images, step=None, **kwargs):
            calls.append(("image", key, images, step))

        def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
            calls.append(("text", key, columns, data, step))

    class Client:
        def log_figure(self, run_id, figure, artifact_file):
            calls.append(("figure", run_id, figure, artifact_file))

        def log_text(self, run_id, text, artifact_file):
            calls.append(("text", run_id, text, artifact_file))

    class MLFlow(MLFlowLogger):
        experiment, run_id = Client(), "r1"

        def __init__(self):
            pass

    log_figure([Wandb(), MLFlow()], "a/map", figure, 3)
    log_text([Wandb(), MLFlow()], "a/event", "what", 3)
    assert calls == [
        ("image", "a/map", [figure], 3),
        ("figure", "r1", figure, "a/map/step_0000003.png"),
        ("text", "a/event", ["step", "text"], [["3", "what"]], 3),
        ("text", "r1", "what", "a/event/step_0000003.txt"),
    ]


def test_an_unknown_logger_gets_scalars_and_is_told_once(figure, caplog):
    other = Other()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        log_scalars([other], {"a/x": torch.tensor(1.0)}, 3)
        for _ in range(2):
            log_figure([other], "a/map", figure, 3)
            log_text([other], "a/event", "what", 3)
    assert other.seen == [({"a-x": 1.0}, 3)]
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert "Figures are not written to Other" in messages[0]


def test_no_logger_is_said_once(caplog, figure):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert not takes_figures([])
        assert not takes_figures([])
        log_figure([], "a", figure, 0)
    assert [r.getMessage()[:18] for r in caplog.records] == ["There is no logger"]


def test_no_matplotlib_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert not takes_figures([Other()])
    assert "pip install" in caplog.text


def test_only_rank_zero_draws(tmp_path, figure, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_figure([CSVLogger(tmp_path)], "a/map", figure, 3)
    assert not list(tmp_path.rglob("*.png"))


def test_a_failing_logger_is_warned_of_once_for_each_failure_and_the_others_go_on():
    class Failing(Other):
        def log_metrics(self, metrics, step=None):
            raise OSError("disk full" if step < 3 else "no route")

    other = Other()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2, 3, 4):
            log_scalars([Failing(), other], {"x": 1.0}, step)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert messages[0] == "Failing failed with OSError: disk full. The fit goes on without it."
    assert "no route" in messages[1]
    assert [step for _, step in other.seen] == [1, 2, 3, 4]
