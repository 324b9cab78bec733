"""The trigger that watches a metric in a run that is resumed: as in one that is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import WhenMetric
from tests.callbacks.modules import Line, fit, line_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


class Rarely(Line):
    """Logs ``rare`` in the first batch of an epoch only: 0.9, 0.8, 0.7."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.log("rare", 0.9 - 0.1 * self.current_epoch)
        return super().training_step(batch, batch_idx)


def run(trigger, tmp_path, *others, module=Line, **options):
    callback = RejuvenationCallback(line_anchor(), when=trigger, alpha=0.3)
    trainer = fit(module(), callback, *others, tmp_path=tmp_path, **{"max_epochs": 4, **options})
    return callback, trainer


def save(tmp_path, **options):
    """Every kind of checkpoint: after every batch, validation and epoch."""
    kinds = {
        "batch": {"every_n_train_steps": 1},
        "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False, "monitor": "level"},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    }
    return [
        ModelCheckpoint(tmp_path / kind, filename="{step}", save_top_k=-1, **options)
        for kind, options in kinds.items()
    ]


CASES = {
    # 0.7 is logged after step 12
    "of validation": (WhenMetric("level", 0.75, every_n_steps=5), Line, [15]),
    "of validation, in a row": (WhenMetric("level", 0.95, patience=3, every_n_steps=5), Line, [15]),
    "before the first validation": (WhenMetric("level", 0.75, every_n_steps=3), Line, [15]),
    # 0.8 is logged after epoch 1, after its validation
    "of a training epoch": (WhenMetric("epoch_loss", 0.85, every_n_steps=7, strict=False), Line, [14]),
    "of a training epoch, seen at validations": (WhenMetric("epoch_loss", 0.95, strict=False), Line, [12]),
    "of some steps": (WhenMetric("rare", 0.85, every_n_steps=4), Rarely, [8]),
}


@pytest.mark.parametrize(("trigger", "module", "expected"), CASES.values(), ids=CASES.keys())
def test_resumed_from_anywhere_it_fires_at_the_same_step(trigger, module, expected, tmp_path):
    callback, _ = run(trigger, tmp_path, *save(tmp_path), module=module)
    assert callback.rejuvenated_at == expected
    paths = sorted(tmp_path.glob("*/step=*.ckpt"))
    assert len(paths) == 16 + 4 + 4
    for path in paths:
        step = int(path.stem.removeprefix("step="))
        if step == 16 or (path.parent.name == "batch" and step % 4 == 0):
            continue  # the end; and where Lightning leaves out the validation that was to come
        assert torch.load(path, weights_only=True)["callbacks"]["RejuvenationCallback"]
        again, _ = run(trigger, tmp_path / "again", module=module, ckpt_path=path)
        assert again.rejuvenated_at == expected, path


def test_a_look_before_the_first_validation_is_passed_over(tmp_path):
    """The sanity check has logged the metric; without it nothing says that it will come."""
    callback, _ = run(WhenMetric("level", 0.95, every_n_steps=3), tmp_path)
    assert callback.rejuvenated_at == [6]
    with pytest.raises(RuntimeError, match=r"'level' .* Known: \['loss'\].*strict=False"):
        run(WhenMetric("level", 0.95, every_n_steps=3), tmp_path, num_sanity_val_steps=0)
    callback, _ = run(
        WhenMetric("level", 0.95, every_n_steps=3, strict=False), tmp_path, num_sanity_val_steps=0
    )
    assert callback.rejuvenated_at == [6]


def test_a_second_fit_of_a_trainer_goes_on(tmp_path):
    callback, trainer = run(WhenMetric("level", 0.75, every_n_steps=5), tmp_path, max_epochs=3)
    assert callback.rejuvenated_at == []
    trainer.fit_loop.max_epochs = 5
    trainer.fit(Line())
    assert callback.rejuvenated_at == [15]


def test_another_metric_after_a_resume_starts_afresh(tmp_path):
    """What was seen of the old one is not taken for the new one's."""
    run(WhenMetric("level", 0.95, patience=3, every_n_steps=5), tmp_path, *save(tmp_path))
    resume = {"ckpt_path": tmp_path / "batch" / "step=11.ckpt"}
    again, _ = run(WhenMetric("loss", 1e9, patience=2, every_n_steps=2), tmp_path, **resume)
    assert again.rejuvenated_at == [14]
    with pytest.raises(RuntimeError, match="'other'"):
        run(WhenMetric("other", 0.5, every_n_steps=3), tmp_path, **resume)


def test_looks_at_another_interval_after_a_resume(tmp_path):
    run(WhenMetric("loss", -1.0, every_n_steps=1), tmp_path, *save(tmp_path))
    again, _ = run(
        WhenMetric("loss", 1e9, every_n_steps=5), tmp_path, ckpt_path=tmp_path / "batch" / "step=6.ckpt"
    )
    assert again.rejuvenated_at == [10]


def test_a_state_without_the_last_value_is_taken_up(tmp_path):
    """That of a checkpoint of an earlier version."""
    trigger = WhenMetric("level", 0.5, every_n_steps=2)
    trigger.load_state_dict({"crossed": 0, "value": 0.75, "looked": 2})
    assert trigger.state_dict()["last"] is None
    assert trigger.state_dict()["looked"] == 2


def test_copies_keep_the_last_value(tmp_path):
    callback, _ = run(WhenMetric("level", 0.1, every_n_steps=5), tmp_path)
    state = callback.state_dict()
    assert state["trigger"]["last"] == pytest.approx(0.6)  # of the last validation, after the last look
    assert copy.deepcopy(callback).state_dict() == pickle.loads(pickle.dumps(callback)).state_dict() == state


def test_a_resumed_run_knows_what_the_sanity_check_has_announced(tmp_path):
    """It may run without one of its own; its first look comes before the first value."""
    trigger = WhenMetric("level", 0.95, every_n_steps=3)
    run(trigger, tmp_path, *save(tmp_path), max_epochs=1)
    resume = {"ckpt_path": tmp_path / "batch" / "step=2.ckpt", "num_sanity_val_steps": 0}
    again, _ = run(trigger, tmp_path, **resume)
    assert again.rejuvenated_at == [6]
