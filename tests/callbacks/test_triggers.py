"""The triggers that count: what can never come is refused at the start of the fit, and nothing that can."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import AtEnd, AtEpoch, AtStart, AtStep, Every, Trigger
from tests.callbacks.modules import Line, fit, line_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def fired_at(trigger, tmp_path, module=None, *others, **options):
    callback = RejuvenationCallback(line_anchor(), when=trigger, reset_fraction=0, alpha=0.5)
    fit(module or Line(), callback, *others, tmp_path=tmp_path, **options)
    return callback.rejuvenated_at


class Endless(Line):
    """Data of unknown length."""

    def train_dataloader(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(range(4))

        return torch.utils.data.DataLoader(Stream(), batch_size=None)


NEVER = {
    "epoch": (AtEpoch(3), {}, "Epoch 3 can never come: the fit ends before epoch 3"),
    "epoch by steps": (AtEpoch(2), {"max_steps": 8}, "after step 8, and an epoch has 4"),
    "epoch by steps alone": (AtEpoch(2), {"max_epochs": -1, "max_steps": 8}, "after step 8"),
    "accumulated": (AtEpoch(2), {"max_steps": 4, "accumulate_grad_batches": 3}, "an epoch has 2"),
    "step": (AtStep(12), {}, "Step 12 can never come: the fit ends after step 12"),
    "accumulated step": (AtStep(6), {"accumulate_grad_batches": 2}, "after step 6"),
    "every epochs": (Every(epochs=3), {}, "Epoch 3 can never come"),
    "every steps": (Every(steps=12), {}, "Step 12 can never come"),
}


@pytest.mark.parametrize(("trigger", "options", "message"), NEVER.values(), ids=NEVER.keys())
def test_what_can_never_come_is_refused(trigger, options, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        fired_at(trigger, tmp_path, **options)
    assert "`at_end=True`" in str(caught.value)


COMES = {
    "epoch": (AtEpoch(2), {}, [8]),
    "epoch without end": (AtEpoch(2), {"max_epochs": -1, "max_steps": 9}, [8]),
    "step": (AtStep(11), {}, [11]),
    "every": (Every(steps=11), {}, [11]),
    "accumulated": (AtEpoch(2), {"max_steps": 5, "accumulate_grad_batches": 3}, [4]),
    "step zero": (AtStep(0), {}, [0]),
}


@pytest.mark.parametrize(("trigger", "options", "steps"), COMES.values(), ids=COMES.keys())
def test_what_can_come_comes(trigger, options, steps, tmp_path):
    assert fired_at(trigger, tmp_path, **options) == steps


def test_where_only_the_run_can_tell_nothing_is_refused(tmp_path):
    assert fired_at(AtStep(6), tmp_path, Endless(), max_epochs=2) == [6]
    assert fired_at(AtStep(20), tmp_path, Endless(), max_epochs=2) == []
    schedule = GradientAccumulationScheduler({0: 2, 1: 1})
    assert fired_at(AtStep(5), tmp_path, Line(), schedule) == [5]
    # Two optimizers that step at every batch: 24 steps, not 12.
    assert fired_at(AtStep(16), tmp_path, Line(manual=1)) == [16]


def test_intervals_that_have_passed_count_once(tmp_path):
    """In a run that is resumed with a callback that it did not have before."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=9)
    fit(Line(), saver, tmp_path=tmp_path)
    assert fired_at(Every(steps=2), tmp_path, ckpt_path=tmp_path / "step=9.ckpt") == [9, 10]


def test_a_trigger_of_ones_own(tmp_path):
    class Prime(Trigger):
        def due(self, trainer, epoch):
            return trainer.global_step in (7, 8)

        def reason(self):
            return "as seven is prime"

    assert fired_at(Prime(), tmp_path) == [7]


def test_callbacks_do_not_share_a_triggers_state(tmp_path):
    trigger = Every(steps=5)
    callbacks = [
        RejuvenationCallback(line_anchor(), when=trigger, reset_fraction=0, name=name, alpha=0.5)
        for name in "ab"
    ]
    fit(Line(), *callbacks, tmp_path=tmp_path)
    assert [c.rejuvenated_at for c in callbacks] == [[5, 10], [5, 10]]
    assert trigger.state_dict() == {"done": 0}


@pytest.mark.parametrize(
    "make",
    [
        lambda: AtEpoch(True),
        lambda: AtEpoch(1.5),
        lambda: AtStep(-1),
        lambda: Every(),
        lambda: Every(epochs=1, steps=1),
        lambda: Every(steps=0),
    ],
)
def test_bad_triggers_are_refused_at_construction(make):
    with pytest.raises(MisconfigurationException, match="Expected"):
        make()


def test_reasons():
    triggers = AtStart(), AtEnd(), AtEpoch(2), AtStep(3), Every(epochs=4), Every(steps=5)
    assert [trigger.reason() for trigger in triggers] == [
        "at the start of the fit",
        "at the end of the fit",
        "at epoch 2",
        "at step 3",
        "as every 4 epochs",
        "as every 5 steps",
    ]
