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
    callback = RejuvenationCallback(line_anchor(), when=trigger, alpha=0.5)
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
    "manual step": (AtStep(12), {"max_steps": 12, "manual": 1}, "Step 12 can never come: .* after step 12"),
    "manual every": (Every(steps=12), {"max_steps": 12, "manual": 2}, "Step 12 can never come"),
    "schedule": (AtStep(8), {"max_steps": 8, "schedule": {0: 2, 1: 1}}, "after step 8"),
    "unknown length": (AtStep(8), {"max_steps": 8, "endless": True}, "after step 8"),
}


@pytest.mark.parametrize(("trigger", "options", "message"), NEVER.values(), ids=NEVER.keys())
def test_what_can_never_come_is_refused(trigger, options, message, tmp_path):
    options = dict(options)
    others = [GradientAccumulationScheduler(options.pop("schedule"))] if "schedule" in options else []
    module = (Endless if options.pop("endless", False) else Line)(manual=options.pop("manual", 0))
    with pytest.raises(MisconfigurationException, match=message) as caught:
        fired_at(trigger, tmp_path, module, *others, **options)
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
    assert fired_at(AtStep(11), tmp_path, Line(manual=1), max_steps=13) == [12]
    # One step in eight batches: the epoch comes, few as the steps are.
    assert fired_at(AtEpoch(2), tmp_path, Line(manual=8), max_steps=4) == [2]


def test_the_batch_that_ends_a_manual_fit_may_make_more_steps_than_planned(tmp_path):
    callback = RejuvenationCallback(line_anchor(), when=AtStep(12), stop_after=True, alpha=0.5)
    fit(Line(manual=1), callback, tmp_path=tmp_path, max_steps=11)
    assert callback.rejuvenated_at == [12]


def test_epochs_whose_data_change_may_be_longer(tmp_path):
    class Growing(Line):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(4 * (1 + self.current_epoch)), batch_size=None)

    assert fired_at(AtStep(20), tmp_path, Growing(), reload_dataloaders_every_n_epochs=1) == [20]
    assert fired_at(AtEpoch(2), tmp_path, Growing(), reload_dataloaders_every_n_epochs=1, max_steps=14) == [
        12
    ]


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
    callbacks = [RejuvenationCallback(line_anchor(), when=trigger, name=name, alpha=0.5) for name in "ab"]
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "start"}, "`when` to be a trigger, .* but got 'start'"),
        ({"when": 5}, "`when` to be a trigger, .* but got 5; for the start.* `at_start`"),
        ({"when": AtStart}, r"`when` .* but got the class AtStart; make one of it: `AtStart\(…\)`"),
        ({"when": dict}, "`when` .* but got the class dict"),
        ({"at_start": "no"}, "`at_start` to be True or False but got 'no'"),
        ({"at_end": 1}, "`at_end` to be True or False but got 1"),
        ({"at_start": None, "at_end": True}, "`at_start` to be True or False but got None"),
        ({"at_epoch": "1"}, "`at_epoch` to be a whole number of at least 0 but got '1'"),
        ({"at_epoch": True}, "`at_epoch` to be a whole number"),
    ],
)
def test_arguments_of_another_type_are_refused_at_construction(arguments, message):
    with pytest.raises(MisconfigurationException, match=f"Expected argument {message}"):
        RejuvenationCallback("base", alpha=0.5, **arguments)


def test_reasons():
    triggers = AtStart(), AtEnd(), AtEpoch(2), AtStep(3), Every(epochs=4), Every(steps=5)
    assert [trigger.reason() for trigger in triggers] == [
        "at the start of the fit",
        "at the end of the fit",
        "at epoch 2",
        "at step 3",
        "after every 4 epochs",
        "after every 5 steps",
    ]
