"""The trigger that watches a metric: when it looks, at what, and what it refuses."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rejuv import PlasticityCallback, RejuvenationCallback
from lightning_rejuv.callbacks import WhenMetric
from lightning_rejuv.metrics import PlasticityMonitor
from tests.callbacks.modules import Calibrated, Line, fit, line_anchor
from tests.conftest import batch, sharpened, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def fired_at(trigger, tmp_path, module=None, before=(), after=(), **options):
    callback = RejuvenationCallback(line_anchor(), when=trigger, alpha=0.5)
    fit(module or Line(), *before, callback, *after, tmp_path=tmp_path, **options)
    return callback.rejuvenated_at


# Four batches an epoch; validated after the epochs 0, 1, 2 with 0.9, 0.8, 0.7. What is seen then is acted upon
# before the next batch, so that the last look comes too late.
LOOKS = {
    "below 0.75": (WhenMetric("level", 0.75), []),
    "below 0.85": (WhenMetric("level", 0.85), [8]),
    "below 0.95 twice": (WhenMetric("level", 0.95, patience=2), [8]),
    "above 0.85": (WhenMetric("level", 0.85, mode="max"), [4]),
    "above 0.85 twice": (WhenMetric("level", 0.85, mode="max", patience=2), []),
    "every 3 steps": (WhenMetric("loss", 1e9, every_n_steps=3), [3]),
    "every 3 steps, twice": (WhenMetric("loss", 1e9, patience=2, every_n_steps=3), [6]),
    "every 5 steps at a validation's": (WhenMetric("level", 0.95, every_n_steps=5), [5]),
}


@pytest.mark.parametrize(("trigger", "expected"), LOOKS.values(), ids=LOOKS.keys())
def test_it_fires_when_it_should(trigger, expected, tmp_path):
    assert fired_at(trigger, tmp_path) == expected


def test_looks_are_at_optimizer_steps(tmp_path):
    trigger = WhenMetric("loss", 1e9, every_n_steps=2)
    assert fired_at(trigger, tmp_path, accumulate_grad_batches=2, max_epochs=3) == [2]


def test_looks_have_to_be_in_a_row(tmp_path):
    class Wavering(Line):
        def validation_step(self, batch, batch_idx):
            self.log("level", [0.0, 1.0, 0.0, 0.0, 1.0][self.current_epoch], batch_size=1)

    assert fired_at(WhenMetric("level", 0.5, patience=2), tmp_path, Wavering(), max_epochs=5) == [16]


@pytest.mark.parametrize(("accumulated", "stop", "steps"), [(3, True, 1), (4, False, 1)])
def test_what_is_decided_stays_decided(accumulated, stop, steps, tmp_path):
    """Crossed in the middle of an accumulation, and not any more at a validation before its end."""

    class Once(Line):
        seen = 0

        def validation_step(self, batch, batch_idx):
            self.seen += not self.trainer.sanity_checking
            self.log("level", 0.0 if self.seen == 1 else 1.0, batch_size=1)

    trigger = WhenMetric("level", 0.5)
    callback = RejuvenationCallback(line_anchor(), when=trigger, stop_after=stop, alpha=0.5)
    options = {"accumulate_grad_batches": accumulated, "val_check_interval": 2}
    trainer = fit(Once(), callback, tmp_path=tmp_path, **options)
    assert callback.rejuvenated_at == [steps]
    assert (trainer.global_step == steps) == stop


@pytest.mark.parametrize("mode", ["min", "max"])
def test_not_a_number_never_crosses(mode, tmp_path):
    class Unknown(Line):
        def validation_step(self, batch, batch_idx):
            self.log("level", float("nan"), batch_size=1)

    assert fired_at(WhenMetric("level", 0.5, mode=mode), tmp_path, Unknown()) == []


def test_without_validation_the_metric_of_an_epoch_counts(tmp_path):
    """That of this epoch: the module's own hook, which logs it, runs after the callbacks'."""
    # 1.0, 0.9 and 0.8 after the epochs 0, 1, 2
    assert fired_at(WhenMetric("epoch_loss", 0.95), tmp_path, Line(validates=False)) == [8]
    assert fired_at(WhenMetric("epoch_loss", 1.05), tmp_path, Line(validates=False)) == [4]


@pytest.mark.parametrize("name", ["epoch=0", "epoch=1"])
def test_a_checkpoint_of_an_epochs_end_has_seen_its_metric(name, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trigger = WhenMetric("epoch_loss", 0.95)
    assert fired_at(trigger, tmp_path, Line(validates=False), after=[saver]) == [8]
    resumed = fired_at(trigger, tmp_path, Line(validates=False), ckpt_path=tmp_path / f"{name}.ckpt")
    assert resumed == [8]


def test_an_unknown_metric_is_refused_at_the_start_with_the_known_ones(tmp_path):
    """The sanity check has logged what validation logs."""
    steps = []

    class Counted(Line):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=r"'levle' .* Known: \['level'\].*strict=False"):
        fired_at(WhenMetric("levle", 0.5), tmp_path, Counted())
    assert steps == []
    # Without a sanity check the first look tells, and lists what training has logged as well.
    with pytest.raises(RuntimeError, match=r"'levle' .* Known: \['level', 'loss'\]"):
        fired_at(WhenMetric("levle", 0.5), tmp_path, Counted(), num_sanity_val_steps=0)
    assert len(steps) == 4
    with pytest.raises(RuntimeError, match=r"'lost' .* Known: \['loss'\]"):
        fired_at(WhenMetric("lost", 0.5, every_n_steps=4), tmp_path)
    with pytest.raises(RuntimeError, match=r"'lost' .* Known: \['epoch_loss', 'loss'\]"):
        fired_at(WhenMetric("lost", 0.5), tmp_path, Line(validates=False))


def test_a_metric_that_comes_later_needs_leave(tmp_path):
    """Logged by training, and looked at where validation ends; or logged in a later epoch only."""

    class Late(Line):
        def on_validation_epoch_end(self):
            if self.current_epoch == 1:
                self.log("late", 0.1)

    assert fired_at(WhenMetric("loss", 1e9, strict=False), tmp_path) == [4]
    assert fired_at(WhenMetric("late", 0.5, strict=False), tmp_path, Late()) == [8]
    with pytest.raises(MisconfigurationException, match="'late'"):
        fired_at(WhenMetric("late", 0.5), tmp_path, Late())


def test_measures_of_plasticity_need_their_callback(tmp_path):
    trigger = WhenMetric("plasticity/token_entropy", 0.1)
    with pytest.raises(
        MisconfigurationException, match=r"measured by `PlasticityCallback`, which is not among"
    ):
        fired_at(trigger, tmp_path)


def _plasticity(every):
    monitor = PlasticityMonitor(probe=[batch(seed=5)], sites=None, rank_sites=None)
    return PlasticityCallback(monitor, every, figure_every_n_steps=0)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("first", [True, False])
def test_a_misspelt_measure_of_plasticity_is_refused_with_those_there_are(first, every, tmp_path):
    """At the start where PlasticityCallback has measured before, and else at the first look."""
    base, steps = tiny_llama(), []

    class Counted(Calibrated):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    trigger = WhenMetric("plasticity/tokn_entropy", 0.1, every_n_steps=every)
    callback = RejuvenationCallback(base, when=trigger, alpha=0.5)
    both = [_plasticity(2), callback] if first else [callback, _plasticity(2)]
    with pytest.raises(
        (MisconfigurationException, RuntimeError), match="'plasticity/tokn_entropy'"
    ) as caught:
        fit(Counted(sharpened(base), base), *both, tmp_path=tmp_path, max_epochs=2)
    assert len(steps) == (0 if first else every or 4)
    assert "'plasticity/token_entropy'" in str(caught.value)
    assert "self.log" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "monitored"),
    [
        ("plasticity/update_ratio", {"track_updates": True}, {"probe": True}),
        ("plasticity/token_entropy", {}, {"probe": False}),  # recorded in training
        ("plasticity/pass_at_1", {}, {"probe": True}),
    ],
)
def test_measures_that_are_taken_in_training_are_not_refused_at_its_start(name, options, monitored, tmp_path):
    base = tiny_llama()

    class Rewarded(Calibrated):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "rewards": torch.tensor([[0.0, 1.0]])}

    probe = [batch(seed=5)] if monitored["probe"] else None
    monitor = PlasticityMonitor(anchor=base, probe=probe, rank_sites=None)
    plasticity = PlasticityCallback(monitor, 2, figure_every_n_steps=0, **options)
    trigger = WhenMetric(name, 1e9, every_n_steps=2)
    callback = RejuvenationCallback(base, when=trigger, alpha=0.5)
    module = Rewarded(sharpened(base), base)
    fit(module, plasticity, callback, tmp_path=tmp_path, max_epochs=1, log_every_n_steps=1)
    assert callback.rejuvenated_at == [2]


def test_measures_of_plasticity_are_seen_when_they_are_taken(tmp_path):
    base = tiny_llama()
    made = []
    trigger = WhenMetric("plasticity/token_entropy", 1e9, every_n_steps=2)
    for first in (True, False):
        callback = RejuvenationCallback(base, when=trigger, alpha=0.5)
        both = [_plasticity(2), callback] if first else [callback, _plasticity(2)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Calibrated(sharpened(base), base), *both, tmp_path=tmp_path, max_epochs=1)
        warned = any("List PlasticityCallback first" in str(w.message) for w in caught)
        assert warned is not first
        made.append(callback.rejuvenated_at)
    assert made == [[2], [2]]


def test_the_line_says_what_was_seen(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fired_at(WhenMetric("level", 0.85), tmp_path)
        fired_at(WhenMetric("level", 0.75, mode="max", patience=2), tmp_path)
        fired_at(WhenMetric("level", 0.1), tmp_path)
    lines = [r.getMessage() for r in caplog.records if "ejuvenated" in r.getMessage()]
    assert lines[0].startswith("Rejuvenated before step 8, since level 0.8 < 0.85: alpha 0.500, drift ")
    assert lines[1].startswith("Rejuvenated before step 8, since level 0.8 > 0.75 at 2 looks in a row: alpha")
    assert lines[2] == "Not rejuvenated in this fit: WhenMetric did not come due."


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": float("nan")},
        {"threshold": "0.1"},
        {"threshold": True},
        {"threshold": None},
        {"threshold": 0.1, "mode": "low"},
        {"threshold": 0.1, "patience": 0},
        {"threshold": 0.1, "every_n_steps": 0},
        {"threshold": 0.1, "strict": "no"},
        {"monitor": None, "threshold": 0.1},
        {"monitor": "", "threshold": 0.1},
    ],
)
def test_bad_arguments_are_refused_at_construction(options):
    with pytest.raises(MisconfigurationException, match="Expected argument"):
        WhenMetric(**{"monitor": "level", **options})


def test_its_state_is_plain(tmp_path):
    trigger = WhenMetric("level", 0.5, every_n_steps=2)
    trainer = SimpleNamespace(callback_metrics={"level": torch.tensor(0.25)}, global_step=5, world_size=1)
    trigger.observe_step(trainer)
    seen = {
        "crossed": 1,
        "value": 0.25,
        "looked": 2,
        "monitor": "level",
        "every_n_steps": 2,
        "last": 0.25,
        "announced": False,
    }
    assert trigger.state_dict() == seen
    again = WhenMetric("level", 0.5, every_n_steps=2)
    assert math.isnan(again.state_dict()["value"])
    again.load_state_dict(trigger.state_dict())
    again.observe_step(trainer)  # the same step again is no new look
    assert again.state_dict()["crossed"] == 1


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_at_the_threshold_has_not_crossed_it(mode, tmp_path):
    class Level(Line):
        def validation_step(self, batch, batch_idx):
            beyond = -1.0 if mode == "min" else 1.0
            self.log("level", 0.5 + (beyond if self.current_epoch == 1 else 0.0), batch_size=1)

    assert fired_at(WhenMetric("level", 0.5, mode=mode), tmp_path, Level()) == [8]


@pytest.mark.parametrize("every", [1, None])
def test_a_look_before_the_first_measurement_names_both_intervals(every, tmp_path):
    """Where the name may be right nobody is told to correct it."""
    base = tiny_llama()
    watching = PlasticityCallback(
        PlasticityMonitor(probe=[batch(seed=5)], sites=None, rank_sites=None),
        7,
        figure_every_n_steps=0,
        track_updates=True,
    )
    trigger = WhenMetric("plasticity/update_ratio", 1e9, every_n_steps=every)
    callback = RejuvenationCallback(base, when=trigger, alpha=0.5)
    with pytest.raises(RuntimeError, match="has not measured it yet") as caught:
        fit(Calibrated(sharpened(base), base), watching, callback, tmp_path=tmp_path)
    looks = "validation or epoch" if every is None else "1 steps"
    message = str(caught.value)
    assert "the model every 7 steps and rollouts every 50 batches" in message
    assert f"the trigger looks after every {looks}" in message
    assert "`strict=False`" in message
