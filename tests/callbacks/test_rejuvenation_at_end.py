"""At the end of a fit, and ending a fit: what it is left with, what is on disk, and what is not edited."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import AtEnd, AtEpoch, AtStart, AtStep, Every, WhenMetric
from tests.callbacks.modules import Line, Snapshots, equal, fit, fused, line_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def at_end(**options):
    return RejuvenationCallback(line_anchor(), **{"at_end": True, **options}, alpha=0.3)


class Last(Callback):
    """The weights that the last update leaves."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights = copy.deepcopy(pl_module.model.state_dict())


class BySteps(Callback):
    """The weights by how many updates they have had."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step not in self.weights:
            self.weights[trainer.global_step] = copy.deepcopy(pl_module.model.state_dict())


def expected(last):
    return fused(last.weights, line_anchor(), 0.3)


def weights_in(path):
    state = torch.load(path, weights_only=True)
    return {name.removeprefix("model."): tensor for name, tensor in state["state_dict"].items()}


@pytest.mark.parametrize(
    ("options", "neighbours"),
    [
        ({"max_epochs": 2}, []),
        ({"max_epochs": -1, "max_steps": 6}, []),
        ({"max_epochs": 9}, [EarlyStopping("level", mode="max", patience=1)]),
        ({"max_epochs": -1}, [Timer("00:00:00:01")]),
    ],
    ids=["max_epochs", "max_steps", "early stopping", "max_time"],
)
def test_however_the_fit_ends_the_model_is_edited_after_the_last_update(options, neighbours, tmp_path):
    callback, last, module = at_end(), Last(), Line()
    trainer = fit(module, callback, last, *neighbours, tmp_path=tmp_path, **options)
    assert callback.rejuvenated_at == [trainer.global_step]
    assert trainer.global_step > 0
    assert equal(module.model.state_dict(), expected(last))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert equal(weights_in(tmp_path / "after.ckpt"), expected(last))


def test_at_end_is_the_trigger_of_that_name(tmp_path):
    for moment in ({"at_end": True}, {"at_end": False, "when": AtEnd()}):
        callback = at_end(**moment)
        fit(Line(), callback, tmp_path=tmp_path, max_epochs=1)
        assert callback.rejuvenated_at == [4]


def test_checkpoints_hold_the_weights_before_and_one_file_the_weights_after(tmp_path):
    logger = CSVLogger(tmp_path)
    callback, last, saver = at_end(), Last(), ModelCheckpoint(monitor="level", save_last=True)
    fit(Line(), callback, last, saver, tmp_path=tmp_path, logger=logger, log_every_n_steps=1)
    directory = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    assert {path.name for path in directory.iterdir()} == {
        "epoch=2-step=12.ckpt",
        "last.ckpt",
        "rejuvenated.ckpt",
        "rejuvenation.json",
    }
    for name in ("epoch=2-step=12.ckpt", "last.ckpt"):
        assert equal(weights_in(directory / name), last.weights)
    assert equal(weights_in(directory / "rejuvenated.ckpt"), expected(last))
    assert json.loads((directory / "rejuvenation.json").read_text())["alpha"] == 0.3
    summary = (directory.parent / "rejuvenation" / "summary.txt").read_text()
    assert "Rejuvenated after step 12, at the end of the fit: alpha 0.300, drift " in summary


def test_the_file_is_as_much_as_the_others(tmp_path):
    callback, last = at_end(), Last()
    fit(
        Line(),
        callback,
        last,
        ModelCheckpoint(tmp_path, save_weights_only=True),
        tmp_path=tmp_path,
        max_epochs=1,
    )
    assert "callbacks" not in torch.load(tmp_path / "rejuvenated.ckpt", weights_only=True)
    assert equal(weights_in(tmp_path / "rejuvenated.ckpt"), expected(last))


def test_remote_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for saver in ([], [ModelCheckpoint("memory://run/checkpoints")]):
        fit(Line(), at_end(), *saver, tmp_path="memory://run", max_epochs=1)
    files = MemoryFileSystem()
    assert json.loads(files.cat("/run/rejuvenation.json"))["alpha"] == 0.3
    assert {path.rpartition("/")[2] for path in files.ls("/run/checkpoints", detail=False)} == {
        "epoch=0-step=4.ckpt",
        "rejuvenated.ckpt",
        "rejuvenation.json",
    }
    assert list(tmp_path.iterdir()) == []  # no directory called "memory:"


def test_resuming_what_it_left_does_not_edit_again(tmp_path):
    callback, last = at_end(), Last()
    fit(Line(), callback, last, ModelCheckpoint(tmp_path), tmp_path=tmp_path, max_epochs=1)
    again, snapshots = at_end(), Snapshots()
    path = tmp_path / "rejuvenated.ckpt"
    fit(Line(), again, snapshots, tmp_path=tmp_path, max_epochs=2, ckpt_path=path)
    assert len(snapshots.taken) == 4
    assert equal(snapshots.taken[0], expected(last))
    assert again.rejuvenated_at == [4]  # what the checkpoint says


@pytest.mark.parametrize("moment", [{}, {"at_end": False, "when": AtStep(9), "stop_after": True}])
@pytest.mark.parametrize(
    ("error", "said"), [(KeyboardInterrupt, 1), (SIGTERMException, 1), (RuntimeError, 0)]
)
def test_an_interrupted_run_is_not_edited_and_says_so(error, said, moment, tmp_path):
    class Interrupted(Line):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise error
            return super().training_step(batch, batch_idx)

    callback, module, last = at_end(**moment), Interrupted(), Last()
    with warnings.catch_warnings(record=True) as caught, pytest.raises((error, SystemExit)):
        warnings.simplefilter("always")
        fit(module, callback, last, tmp_path=tmp_path)
    found = [str(w.message) for w in caught if "interrupted at step 5" in str(w.message)]
    assert len(found) == said
    assert all("it was not. Resume" in message for message in found)
    assert callback.rejuvenated_at == []
    assert equal(module.model.state_dict(), last.weights)


def test_a_finished_run_says_that_it_was_not_edited(tmp_path):
    """The checkpoint of its last update has nothing left to train, and Lightning then calls no hook of training."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4)
    fit(Line(), at_end(), saver, tmp_path=tmp_path, max_steps=4)
    callback = at_end()
    with pytest.warns(UserWarning, match="nothing left to train and ended without rejuvenating"):
        fit(Line(), callback, tmp_path=tmp_path, max_steps=4, ckpt_path=tmp_path / "step=4.ckpt")
    assert callback.rejuvenated_at == []


@pytest.mark.parametrize("moment", [{}, {"at_end": False, "at_start": True}])
@pytest.mark.parametrize(
    "options", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}, {"limit_train_batches": 0.0}]
)
def test_a_fit_without_a_batch_says_that_it_was_not_edited(options, moment, tmp_path):
    callback = at_end(**moment)
    with pytest.warns(UserWarning, match="nothing left to train and ended without rejuvenating"):
        fit(Line(), callback, tmp_path=tmp_path, **options)
    assert callback.rejuvenated_at == []
    assert callback.report is None


STOPS = {
    "start": (AtStart(), 0, {}),
    "step": (AtStep(6), 6, {}),
    "first step of an epoch": (AtStep(4), 4, {}),
    "epoch": (AtEpoch(2), 8, {}),
    "validation": (WhenMetric("level", 0.85), 8, {}),
    "mid-epoch validation": (WhenMetric("level", 0.95, patience=3), 6, {"val_check_interval": 2}),
    "last validation": (WhenMetric("level", 0.75), 12, {}),
    "loss": (WhenMetric("loss", 0.0, mode="max", every_n_steps=5), 5, {}),
    "last loss": (WhenMetric("loss", 0.0, mode="max", every_n_steps=12), 12, {}),
    "after min_steps": (AtStep(2), 7, {"min_steps": 7}),
    "after min_epochs": (AtStep(2), 8, {"min_epochs": 2}),
    "accumulated": (AtStep(1), 1, {"accumulate_grad_batches": 3}),
    "epoch of one update and a part": (AtEpoch(1), 2, {"accumulate_grad_batches": 3}),
    "accumulated, validated in between": (
        WhenMetric("level", 0.95),
        1,
        {"accumulate_grad_batches": 3, "val_check_interval": 2},
    ),
}


@pytest.mark.parametrize(("trigger", "steps", "options"), STOPS.values(), ids=STOPS.keys())
def test_stop_after_ends_the_fit_with_the_edit(trigger, steps, options, tmp_path):
    plain = BySteps()
    fit(Line(), plain, tmp_path=tmp_path, max_epochs=4, **options)
    by_step = plain.weights
    callback = at_end(at_end=False, when=trigger, stop_after=True)
    module, saver = Line(), ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer = fit(module, callback, saver, tmp_path=tmp_path, **options)
    assert trainer.global_step == steps
    assert callback.rejuvenated_at == [steps]
    edited = fused(by_step[steps], line_anchor(), 0.3)
    assert equal(module.model.state_dict(), edited)
    assert equal(weights_in(tmp_path / "ckpt" / "rejuvenated.ckpt"), edited)
    record = torch.load(tmp_path / "ckpt" / "rejuvenated.ckpt", weights_only=True)["callbacks"]
    assert record["RejuvenationCallback"]["armed"] is False
    if steps:  # what was saved before is not edited, and resumes to the same
        assert equal(weights_in(tmp_path / "ckpt" / "last.ckpt"), by_step[steps])


@pytest.mark.parametrize(("threshold", "steps"), [(0.95, 9), (0.85, 12)])
def test_stop_after_a_metric_of_the_modules_own_epoch_hook(threshold, steps, tmp_path):
    """It is logged after the callbacks' hooks, so that a stop comes one update later, but for the last epoch's."""
    plain, module, last = Line(validates=False), Line(validates=False), Last()
    fit(plain, last, tmp_path=tmp_path, max_steps=steps)
    callback = at_end(at_end=False, when=WhenMetric("epoch_loss", threshold), stop_after=True)
    fit(module, callback, tmp_path=tmp_path)
    assert callback.rejuvenated_at == [steps]
    assert equal(module.model.state_dict(), expected(last))


def test_stop_after_without_coming_due_leaves_the_model(tmp_path):
    callback = at_end(at_end=False, when=WhenMetric("level", 0.1), stop_after=True)
    module, last = Line(), Last()
    trainer = fit(module, callback, last, tmp_path=tmp_path)
    assert trainer.global_step == 12
    assert callback.rejuvenated_at == []
    assert equal(module.model.state_dict(), last.weights)


@pytest.mark.parametrize("checkpoint", ["step=4", "step=8"])
def test_stop_after_after_a_resume(checkpoint, tmp_path):
    """Before the moment, and at it: of a run that was to stop at step 8 but did not get to edit."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    plain = Snapshots()
    fit(Line(), plain, saver, tmp_path=tmp_path)
    callback = at_end(at_end=False, at_epoch=2, stop_after=True)
    module = Line()
    trainer = fit(module, callback, tmp_path=tmp_path, ckpt_path=tmp_path / f"{checkpoint}.ckpt")
    assert trainer.global_step == 8
    assert equal(module.model.state_dict(), fused(plain.taken[8], line_anchor(), 0.3))


@pytest.mark.parametrize("trigger", [Every(steps=3), AtEnd()])
def test_stop_after_needs_one_moment_before_the_end(trigger):
    with pytest.raises(
        MisconfigurationException, match=f"`stop_after=True` but got {type(trigger).__name__}"
    ):
        RejuvenationCallback("base", when=trigger, stop_after=True, alpha=0.5)
