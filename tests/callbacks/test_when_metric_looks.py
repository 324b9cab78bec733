"""How often a metric is looked at in a fit: with more patience than looks it is refused, and else not."""

from __future__ import annotations

import itertools
import math

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import WhenMetric
from lightning_rejuv.callbacks._planned import planned_looks
from tests.callbacks.modules import Line, fit, line_anchor
from tests.callbacks.test_triggers import Endless
from tests.callbacks.test_when_metric import fired_at

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def test_in_the_epochs_that_are_left(tmp_path):
    """A look that comes after the last update can do nothing."""
    by_batches = {"check_val_every_n_epoch": None}
    cases = [
        (
            WhenMetric("level", 0.5),
            {"max_epochs": 1},
            "at least 1 times before its last update but it does so 0",
        ),
        (WhenMetric("level", 0.5, patience=3), {}, "at least 3 times .* 2 times"),
        (WhenMetric("level", 0.5), {"check_val_every_n_epoch": 3}, "0 times"),
        (WhenMetric("loss", 0.5, every_n_steps=12), {}, "0 times"),
        (WhenMetric("loss", 0.5, every_n_steps=4, patience=3), {}, "2 times"),
        (WhenMetric("loss", 0.5, every_n_steps=4, patience=2), {"max_steps": 8}, "1 times"),
        (WhenMetric("level", 100.0), {"max_steps": 3}, "0 times"),
        (WhenMetric("level", 100.0), {"max_steps": 4}, "0 times"),
        (WhenMetric("level", 2.0), {"max_steps": 2, "accumulate_grad_batches": 2}, "0 times"),
        (WhenMetric("level", 2.0, patience=5), {"max_epochs": -1, "max_steps": 12}, "2 times"),
        (WhenMetric("level", 2.0), {**by_batches, "val_check_interval": 100, "max_steps": 12}, "0 times"),
        (WhenMetric("level", 2.0, patience=3), {**by_batches, "val_check_interval": 5}, "2 times"),
        (WhenMetric("level", 2.0, patience=50), {"val_check_interval": 2}, "5 times"),
        (WhenMetric("level", 2.0, patience=4), {"val_check_interval": 3}, "3 times"),
        (
            WhenMetric("level", 2.0, patience=3),
            {"val_check_interval": 2, "check_val_every_n_epoch": 2},
            "2 times",
        ),
    ]
    for trigger, options, message in cases:
        with pytest.raises(MisconfigurationException, match=message):
            fired_at(trigger, tmp_path, **options)
    # Just enough, or not to be told beforehand.
    fine = [
        (WhenMetric("level", 2.0), {"max_epochs": 1, "val_check_interval": 2}, [2]),
        (WhenMetric("level", 2.0, patience=2), {}, [8]),
        (WhenMetric("loss", 1e9, every_n_steps=11), {}, [11]),
        (WhenMetric("level", 2.0), {"max_epochs": -1, "max_steps": 6}, [4]),
        (WhenMetric("level", 2.0), {"max_steps": 5}, [4]),
        (WhenMetric("level", 2.0), {"max_steps": 3, "accumulate_grad_batches": 2}, [2]),
        (WhenMetric("level", 2.0, patience=5), {"val_check_interval": 2}, [10]),
        (WhenMetric("level", 2.0, patience=3), {"val_check_interval": 3}, [11]),
        (WhenMetric("level", 2.0, patience=2), {**by_batches, "val_check_interval": 5}, [10]),
        (
            WhenMetric("level", 2.0, patience=2),
            {"val_check_interval": 2, "check_val_every_n_epoch": 2, "max_epochs": 3},
            [8],
        ),
        (WhenMetric("level", 2.0, patience=2), {"reload_dataloaders_every_n_epochs": 1}, [8]),
    ]
    for trigger, options, expected in fine:
        assert fired_at(trigger, tmp_path, **options) == expected
    # Where the fit ends with it the last look counts.
    last = RejuvenationCallback(line_anchor(), when=WhenMetric("level", 2.0), stop_after=True, alpha=0.5)
    fit(Line(), last, tmp_path=tmp_path, max_epochs=1)
    assert last.rejuvenated_at == [4]


class Looks(Callback):
    """Counts the looks of a fit, those that another batch follows and all of them, and what was planned."""

    acted_upon = all = 0

    def on_train_start(self, trainer, pl_module):
        self.planned = [planned_looks(trainer, ends_fit=ends) for ends in (False, True)]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.acted_upon = self.all

    def on_validation_end(self, trainer, pl_module):
        self.all += not trainer.sanity_checking

    def on_train_epoch_end(self, trainer, pl_module):
        self.all += not any(trainer.num_val_batches)


LENGTHS = [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 7}, {"max_epochs": 3, "max_steps": 4}]
SPACINGS = [
    {"limit_val_batches": 0},
    *({"check_val_every_n_epoch": e, "val_check_interval": i} for e in (1, 2) for i in (1.0, 0.5, 3)),
    *({"check_val_every_n_epoch": None, "val_check_interval": i} for i in (3, 5, 100)),
]


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_looks_are_counted_as_they_come(spacing, tmp_path):
    for length, accumulated in itertools.product(LENGTHS, (1, 3)):
        looks = Looks()
        fit(Line(), looks, tmp_path=tmp_path, accumulate_grad_batches=accumulated, **length, **spacing)
        assert looks.acted_upon <= looks.planned[0], (length, accumulated)
        assert looks.all <= looks.planned[1] <= looks.planned[0] + 1, (length, accumulated)
        if accumulated == 1:
            assert looks.acted_upon == looks.planned[0], length


# Lightning refuses half an epoch of unknown length.
@pytest.mark.parametrize("spacing", [s for s in SPACINGS if s.get("val_check_interval") != 0.5], ids=str)
def test_of_data_of_unknown_length_no_look_is_left_out(spacing, tmp_path):
    for length, limit in itertools.product(LENGTHS, (1.0, 3)):
        looks = Looks()
        fit(Endless(), looks, tmp_path=tmp_path, limit_train_batches=limit, **length, **spacing)
        assert looks.acted_upon <= looks.planned[0], (length, limit)
        assert looks.all <= looks.planned[1], (length, limit)
        assert not math.isnan(looks.planned[0])


def test_a_stop_adds_a_validation_that_counts_where_the_fit_ends_with_it(tmp_path):
    """As EarlyStopping does it: after the second of three batches, before the one validation that is planned."""

    class Stopped(Line):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop = batch_idx == 1

    callback = RejuvenationCallback(line_anchor(), when=WhenMetric("level", 2.0), stop_after=True, alpha=0.5)
    fit(Stopped(), callback, tmp_path=tmp_path, max_steps=3)
    assert callback.rejuvenated_at == [2]
