"""Exactly once: a run that is interrupted and resumed makes the same edits as one that is not, whatever it resumes."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import AtEnd, AtEpoch, AtStart, AtStep, Every, WhenMetric
from tests.callbacks.modules import Line, Snapshots, equal, fit, line_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")

# Three epochs of four batches. By when each trigger has fired: after how many updates.
TRIGGERS = {
    "start": (AtStart(), [0]),
    "epoch": (AtEpoch(1), [4]),
    "step": (AtStep(6), [6]),
    "end": (AtEnd(), [12]),
    "every 5 steps": (Every(steps=5), [5, 10]),
    "every epoch": (Every(epochs=1), [4, 8]),
    "validation": (WhenMetric("level", 0.85), [8]),  # 0.8 is seen after epoch 1
    "every 3rd loss": (WhenMetric("loss", 0.0, mode="max", patience=2, every_n_steps=3), [6]),
}
LIMITS = {"max_epochs": {"max_epochs": 3}, "max_steps": {"max_epochs": -1, "max_steps": 12}}
KINDS = {
    "epoch end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation end": {"every_n_epochs": 1, "save_on_train_epoch_end": False, "monitor": "level"},
    "last batch": {"every_n_train_steps": 4},
    "mid-epoch": {"every_n_train_steps": 3},
}


class Final(Callback):
    def on_train_end(self, trainer, pl_module):
        self.weights = copy.deepcopy(pl_module.model.state_dict())


def run(trigger, tmp_path, *savers, limit="max_epochs", ckpt_path=None):
    torch.manual_seed(1)
    callback = RejuvenationCallback(line_anchor(), when=trigger, alpha=0.3)
    snapshots, final = Snapshots(), Final()
    fit(
        Line(),
        callback,
        snapshots,
        final,
        *savers,
        tmp_path=tmp_path,
        ckpt_path=ckpt_path,
        num_sanity_val_steps=0,
        **LIMITS[limit],
    )
    return callback, [*snapshots.taken, final.weights]


QUICK = {"max_epochs": ("start", "step", "end", "every 5 steps", "validation"), "max_steps": ("epoch",)}
MATRIX = [
    pytest.param(
        trigger, limit, id=f"{trigger}, {limit}", marks=[] if trigger in QUICK[limit] else [pytest.mark.slow]
    )
    for trigger in TRIGGERS
    for limit in LIMITS
]


@pytest.mark.parametrize(("trigger", "limit"), MATRIX)
def test_resumed_is_uninterrupted(trigger, limit, tmp_path):
    """From every checkpoint of every kind, before and after the moment."""
    trigger, moments = TRIGGERS[trigger]
    savers = [
        ModelCheckpoint(tmp_path / kind, filename="{step}", save_top_k=-1, **options)
        for kind, options in KINDS.items()
    ]
    callback, whole = run(trigger, tmp_path, *savers, limit=limit)
    assert callback.rejuvenated_at == moments
    sides = set()
    for kind in KINDS:
        paths = sorted((tmp_path / kind).glob("step=*.ckpt"))
        assert len(paths) >= 3
        for path in paths:
            saved = int(re.search(r"step=(\d+)", path.name).group(1))
            state = torch.load(path, weights_only=True)
            # A checkpoint that is written where an edit is due holds the weights before it.
            done = [moment for moment in moments if moment < saved]
            record = state["callbacks"]["RejuvenationCallback"]
            assert record["done_at"] == done
            assert record["armed"] == (len(done) < len(moments) or isinstance(trigger, Every))
            weights = {k.removeprefix("model."): v for k, v in state["state_dict"].items()}
            if saved not in moments and saved < 12:
                assert equal(weights, whole[saved])
            if saved == 12:
                continue
            if kind == "last batch" and isinstance(trigger, WhenMetric) and saved == 8 and not done:
                continue  # Lightning leaves out the validation that was to come; see below
            again, resumed = run(trigger, tmp_path / "again", limit=limit, ckpt_path=path)
            assert again.rejuvenated_at == moments
            assert len(resumed) == len(whole) - saved
            assert all(equal(a, b) for a, b in zip(whole[saved:], resumed, strict=True)), path
            sides.add(bool(done))
    assert sides == ({True} if moments == [0] else {False} if moments == [12] else {True, False})


def test_a_validation_that_lightning_leaves_out_delays_the_edit(tmp_path):
    """A checkpoint of an epoch's last batch is written before its validation, which a resume does not run."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    trigger = WhenMetric("level", 0.95)
    callback, _ = run(trigger, tmp_path, saver)
    assert callback.rejuvenated_at == [4]
    again, _ = run(trigger, tmp_path, ckpt_path=tmp_path / "step=4.ckpt")
    assert again.rejuvenated_at == [8]


def test_weights_metric_and_record_of_a_checkpoint_agree(tmp_path):
    """The best checkpoint by a validation metric holds the weights that were validated."""

    class Validated(Line):
        def on_validation_epoch_end(self):
            self.log("first", self.model[0].weight[0, 0].detach().clone())

    callback = RejuvenationCallback(line_anchor(), at_epoch=1, alpha=0.3)
    saver = ModelCheckpoint(tmp_path, monitor="first", save_top_k=-1, save_last=True)
    fit(Validated(), callback, saver, tmp_path=tmp_path, num_sanity_val_steps=0)
    assert len(saver.best_k_models) == 3
    for path, score in saver.best_k_models.items():
        state = torch.load(path, weights_only=True)
        assert state["state_dict"]["model.0.weight"][0, 0] == score
        assert state["callbacks"]["RejuvenationCallback"]["armed"] == (state["epoch"] == 0)


def test_weights_alone_start_a_new_run(tmp_path):
    """They carry no record: Lightning refuses to resume them, and a fresh fit edits again."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_weights_only=True)
    callback = RejuvenationCallback(line_anchor(), at_start=True, alpha=0.5)
    fit(Line(), callback, saver, tmp_path=tmp_path, max_steps=2)
    path = tmp_path / "step=2.ckpt"
    state = torch.load(path, weights_only=True)
    assert "callbacks" not in state
    with pytest.raises(KeyError, match="contains only the model"):
        fit(Line(), callback, tmp_path=tmp_path, ckpt_path=path)
    module = Line()
    module.load_state_dict(state["state_dict"])
    snapshots = Snapshots()
    fit(module, callback, snapshots, tmp_path=tmp_path, max_steps=2)
    assert callback.rejuvenated_at == [0]
    assert not torch.equal(snapshots.taken[0]["0.weight"], state["state_dict"]["model.0.weight"])


def test_a_second_fit_of_a_trainer_goes_on_with_its_run(tmp_path):
    for trigger, moments in ((AtStart(), [0]), (AtEpoch(1), [4]), (AtEnd(), [12])):
        callback = RejuvenationCallback(line_anchor(), when=trigger, alpha=0.5)
        module = Line()
        trainer = fit(module, callback, tmp_path=tmp_path)
        trainer.fit_loop.max_epochs = 5
        trainer.fit(module)
        assert trainer.global_step == 20
        assert callback.rejuvenated_at == moments


def test_one_that_has_not_come_due_stays_due_in_a_second_fit(tmp_path):
    callback = RejuvenationCallback(line_anchor(), when=WhenMetric("level", 0.65), alpha=0.5)
    module = Line()
    trainer = fit(module, callback, tmp_path=tmp_path, max_epochs=3)  # 0.7 is the last that it sees
    assert callback.rejuvenated_at == []
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module)
    assert callback.rejuvenated_at == [16]


@pytest.mark.parametrize("same", [True, False])
def test_a_new_trainer_is_a_new_run(same, tmp_path):
    """SFT, then RL with a Trainer of its own, be it with the same callback or with another."""
    callback = RejuvenationCallback(line_anchor(), at_start=True, alpha=0.5)
    module = Line()
    fit(module, callback, tmp_path=tmp_path, max_epochs=1)
    trained = copy.deepcopy(module.model.state_dict())
    second = callback if same else RejuvenationCallback(line_anchor(), at_start=True, alpha=0.5)
    snapshots = Snapshots()
    fit(module, second, snapshots, tmp_path=tmp_path, max_epochs=1)
    assert second.rejuvenated_at == [0]
    assert not equal(snapshots.taken[0], trained)


def test_it_can_be_pickled_and_keeps_no_trainer(tmp_path):
    """Launchers pickle it; whoever copies it must not copy a model along."""
    callback = RejuvenationCallback(line_anchor(), when=WhenMetric("epoch_loss", 0.5), alpha=0.5)
    fit(Line(validates=False), callback, tmp_path=tmp_path)
    again = pickle.loads(pickle.dumps(callback))
    assert again.state_dict() == copy.deepcopy(callback).state_dict() == callback.state_dict()
    assert again.state_key == "RejuvenationCallback"
    assert not any(isinstance(value, Trainer) for value in vars(again).values())


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(Line(), Snapshots(), saver, tmp_path=tmp_path)
    callback = RejuvenationCallback(line_anchor(), at_epoch=1, alpha=0.5)
    trainer = fit(Line(), callback, tmp_path=tmp_path, max_epochs=2)
    assert callback.rejuvenated_at == [4]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Line(), ckpt_path=tmp_path / "step=6.ckpt")  # takes this Trainer back to another run
    assert callback.rejuvenated_at == [6]


def test_another_trigger_after_a_resume(tmp_path):
    """Done is done, whatever the configuration says now; a checkpoint's key does not depend on what is tuned."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first = RejuvenationCallback(line_anchor(), when=AtStep(1), alpha=0.5)
    fit(Line(), first, saver, tmp_path=tmp_path, max_epochs=2)
    again = RejuvenationCallback(line_anchor(), when=WhenMetric("level", 2.0), alpha=0.1)
    with pytest.warns(
        UserWarning,
        match=r"by AtStep, and now it is WhenMetric, which does nothing, since it was done.* after steps: \[1\]",
    ):
        fit(Line(), again, tmp_path=tmp_path, ckpt_path=tmp_path / "step=3.ckpt")
    assert again.rejuvenated_at == [1]
    more = RejuvenationCallback(line_anchor(), when=Every(steps=4), alpha=0.1)
    with pytest.warns(UserWarning, match=r"now it is Every, which counts afresh"):
        fit(Line(), more, tmp_path=tmp_path, ckpt_path=tmp_path / "step=3.ckpt")
    assert more.rejuvenated_at == [1, 4, 8]


def test_a_checkpoint_from_the_middle_of_an_edit_is_refused(tmp_path):
    """What a signal handler or `save_on_exception` writes there are neither the old nor the new weights."""

    anchor = line_anchor()
    callback = RejuvenationCallback(anchor, when=AtStep(3), alpha=0.5)
    saver = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr("lightning_rejuv.callbacks.rejuvenation.carry_out", interrupted)
        fit(Line(), callback, saver, tmp_path=tmp_path)
    path = tmp_path / "failed.ckpt"
    assert path.is_file()
    with pytest.raises(RuntimeError, match="written in the middle of it"):
        fit(
            Line(), RejuvenationCallback(anchor, when=AtStep(3), alpha=0.5), tmp_path=tmp_path, ckpt_path=path
        )
