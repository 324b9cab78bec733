"""Beside Lightning's other callbacks, and another one of its kind."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import AtEpoch, AtStep, Every
from tests.callbacks.modules import Line, Snapshots, equal, fit, fused, line_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def rejuvenation(**options):
    return RejuvenationCallback(line_anchor(), **options, alpha=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"at_start": True},
        {"at_epoch": 1},
        {"at_end": True},
        {"when": Every(steps=4)},
        {"at_epoch": 0, "stop_after": True},
    ],
)
def test_stochastic_weight_averaging_would_undo_it(options, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"WeightAveraging keeps an average .* in this fit"):
        fit(Line(), rejuvenation(**options), StochasticWeightAveraging(0.01), tmp_path=tmp_path)


def test_early_stopping_is_warned_of_where_the_loss_will_jump(tmp_path):
    def warned(*others, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Line(), rejuvenation(**options), *others, tmp_path=tmp_path)
        return sum("EarlyStopping counts" in str(w.message) for w in caught)

    stopping = EarlyStopping("level", mode="min", patience=9)
    for options in ({"at_start": True}, {"at_end": True}, {"at_epoch": 1, "stop_after": True}):
        assert warned(stopping, **options) == 0
    assert warned(at_epoch=1) == 0
    assert warned(stopping, at_epoch=1) == 1


def test_two_need_names():
    for names in ({}, {"name": "same"}):
        with pytest.raises(MisconfigurationException, match=r"Expected a `name` .* pass `Rejuv.*name="):
            pair = [rejuvenation(at_epoch=1, **names), rejuvenation(at_end=True, **names)]
            Trainer(callbacks=pair, logger=False)
    alone = rejuvenation(at_epoch=1)
    assert alone.state_key == rejuvenation(at_epoch=1).state_key[:] == "RejuvenationCallback"
    for name in ("a/b", "", "a b"):
        with pytest.raises(MisconfigurationException, match="Expected argument `name`"):
            rejuvenation(at_epoch=1, name=name)


def test_two_with_names(tmp_path):
    """Each has its own state, files and figures, also after a resume between the two."""

    def pair():
        return rejuvenation(at_epoch=1, name="early"), rejuvenation(when=AtStep(7), name="late")

    logger = CSVLogger(tmp_path)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=6, save_top_k=-1)
    early, late = pair()
    whole = Line()
    fit(whole, early, late, saver, tmp_path=tmp_path, logger=logger, log_every_n_steps=1)
    assert (early.rejuvenated_at, late.rejuvenated_at) == ([4], [7])
    names = {p.name for p in (tmp_path / "ckpt").glob("*.json")}
    assert names == {"rejuvenation-early.json", "rejuvenation-late.json"}
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"rejuvenation/early/drift_after", "rejuvenation/late/drift_after"} <= set(header.split(","))
    resumed = Line()
    early, late = pair()
    fit(resumed, late, early, tmp_path=tmp_path, ckpt_path=tmp_path / "ckpt" / "step=6.ckpt")
    assert (early.rejuvenated_at, late.rejuvenated_at) == ([4], [7])
    assert equal(whole.model.state_dict(), resumed.model.state_dict())


def test_a_subclass_has_a_record_of_its_own(tmp_path):
    class Mine(RejuvenationCallback):
        pass

    mine = Mine(line_anchor(), at_epoch=2, alpha=0.5)
    assert mine.state_key.endswith("Mine")
    fit(Line(), rejuvenation(at_epoch=1), mine, tmp_path=tmp_path)
    assert mine.rejuvenated_at == [8]


class Tuned(Line):
    """With a learning rate and a batch size that can be found."""

    def __init__(self):
        super().__init__()
        self.lr = 0.02
        self.batch_size = 1

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(16, 1), batch_size=4)


FINDERS = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=6),
    "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
}


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("anchor", ["given", "init"])
def test_finders_leave_the_moment_to_the_fit(finder, anchor, tmp_path):
    """They train and take it back in the middle of a fit's start."""
    base = line_anchor() if anchor == "given" else Line().model.state_dict()
    callback = RejuvenationCallback(base if anchor == "given" else "init", when=AtStep(2), alpha=0.3)
    snapshots = Snapshots()
    before = Snapshots()
    fit(Tuned(), before, callback, FINDERS[finder](), snapshots, tmp_path=tmp_path, max_epochs=1)
    assert callback.rejuvenated_at == [2]
    assert len(before.taken) == len(snapshots.taken) >= 4
    assert equal(snapshots.taken[2], fused(before.taken[2], base, 0.3))


def test_a_tuner_leaves_the_moment_to_the_fit(tmp_path):
    callback = rejuvenation(when=AtEpoch(1))
    trainer = Trainer(
        max_epochs=2,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    module = Tuned()
    weights = copy.deepcopy(module.model.state_dict())
    Tuner(trainer).lr_find(module, num_training=6)
    assert callback.rejuvenated_at == []
    assert equal(module.model.state_dict(), weights)
    trainer.fit(module)
    assert callback.rejuvenated_at == [4]


def test_a_repeating_one_keeps_all_reports(tmp_path):
    callback = rejuvenation(when=Every(steps=5))
    fit(Line(), callback, tmp_path=tmp_path)
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {"rejuvenation-step=5.json", "rejuvenation-step=10.json"}
    drifts = [json.loads((tmp_path / name).read_text())["drift_before"] for name in sorted(names)]
    assert drifts[0] != drifts[1]


def test_early_stopping_of_a_run_that_is_resumed_where_it_is_rejuvenated_has_counted_already(tmp_path):
    """The moment comes as the fit starts, but after an epoch whose loss is one to improve on."""

    def callbacks():
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        return rejuvenation(at_epoch=1), EarlyStopping("level", mode="min", patience=9), saver

    fit(Line(), *callbacks(), tmp_path=tmp_path, max_epochs=2)
    with pytest.warns(UserWarning, match="EarlyStopping counts"):
        fit(Line(), *callbacks(), tmp_path=tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
