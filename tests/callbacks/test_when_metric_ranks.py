"""The trigger that watches a metric on two ranks: both act, or raise, alike."""

from __future__ import annotations

import pytest

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import WhenMetric
from tests.callbacks.modules import Line, fit, line_anchor
from tests.callbacks.test_distributed import in_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


@pytest.mark.parametrize("first", [0.9, float("nan")])
def test_two_ranks_decide_alike(first, tmp_path):
    """A metric that is not synchronised: where it crosses on one rank, both act, and say the same."""

    class Uneven(Line):
        def validation_step(self, batch, batch_idx):
            self.log("level", [first, 0.4][self.global_rank], batch_size=1)

    def train():
        callback = RejuvenationCallback(line_anchor(), when=WhenMetric("level", 0.6), alpha=0.5)
        fit(Uneven(), callback, tmp_path=tmp_path, strategy="ddp", devices=2)
        return callback.rejuvenated_at, callback._trigger.reason()

    found = in_two_ranks(train)
    assert [error for _, error in found.values()] == [None, None]
    assert found[0][0] == found[1][0] == ([2], "since level 0.4 < 0.6")


class OnOneRank(Line):
    """Logs ``level`` on one rank only."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def validation_step(self, batch, batch_idx):
        if self.global_rank == self.rank:
            self.log("level", 0.9 - 0.1 * self.current_epoch, batch_size=1, rank_zero_only=self.rank == 0)


def _train(rank, trigger, tmp_path, **options):
    def train():
        callback = RejuvenationCallback(line_anchor(), when=trigger, alpha=0.5)
        # Four batches an epoch on each rank.
        options_ = {
            "strategy": "ddp",
            "devices": 2,
            "use_distributed_sampler": False,
            "max_epochs": 4,
            **options,
        }
        fit(OnOneRank(rank), callback, tmp_path=tmp_path, **options_)
        return callback.rejuvenated_at

    return in_two_ranks(train)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("every", "expected"), [(None, [8]), (3, [9])])
def test_not_strict_goes_by_the_rank_that_logs_it(every, expected, rank, tmp_path):
    """0.8 is seen where validation ends after step 8, or at the look after it."""
    trigger = WhenMetric("level", 0.85, every_n_steps=every, strict=False)
    found = _train(rank, trigger, tmp_path)
    assert [error for _, error in found.values()] == [None, None]
    assert found[0][0] == found[1][0] == expected


@pytest.mark.parametrize(
    ("every", "sanity", "kind"),
    [
        (None, 2, "MisconfigurationException"),  # told by the sanity check
        (None, 0, "RuntimeError"),
        (3, 2, "RuntimeError"),
        (5, 0, "RuntimeError"),
    ],
)
def test_strict_raises_on_both_ranks(every, sanity, kind, tmp_path):
    trigger = WhenMetric("level", 0.85, every_n_steps=every)
    found = _train(0, trigger, tmp_path, num_sanity_val_steps=sanity)
    for _, error in found.values():
        assert "Expected a metric 'level' on all 2 ranks" in error
        assert "got it on 1 of them" in error
        assert "`strict=False`" in error
        assert kind in error


def test_the_highest_value_of_the_ranks_decides_where_it_fires_above(tmp_path):
    class Uneven(Line):
        def validation_step(self, batch, batch_idx):
            self.log("level", [0.4, 0.9][self.global_rank], batch_size=1)

    def train():
        trigger = WhenMetric("level", 0.6, mode="max")
        callback = RejuvenationCallback(line_anchor(), when=trigger, alpha=0.5)
        fit(Uneven(), callback, tmp_path=tmp_path, strategy="ddp", devices=2)
        return callback.rejuvenated_at, callback._trigger.reason()

    found = in_two_ranks(train)
    assert [error for _, error in found.values()] == [None, None]
    assert found[0][0] == found[1][0] == ([2], "since level 0.9 > 0.6")
