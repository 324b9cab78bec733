"""When the callback raises the alarms of the RL stage: how far a run is, and what of it was before a resume."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_rejuv.callbacks._rollouts import EntropyAlarms
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.metrics import PlasticityMonitor
from tests.callbacks.test_plasticity import PROBE, Module, Rejuvenates
from tests.conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


class Policy(Module):
    """Returns an entropy by the batches of this fit that came before."""

    def __init__(self, entropy=None, manual=False):
        super().__init__(rewards=True, manual=manual)
        self.values = entropy
        self.batches = 0

    def training_step(self, rows, batch_idx):
        out = super().training_step(rows, batch_idx)
        if self.values:
            out["entropy"] = self.values[min(self.batches, len(self.values) - 1)]
        self.batches += 1
        return out


class Sharpens(Callback):
    """RL lowers the entropy on its way."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.batches == 3:
            pl_module.model.get_output_embeddings().weight.data.mul_(60)


class Rejuvenated(Rejuvenates):
    """Has done it before, with a key that checkpoints can hold."""

    def setup(self, *args, **kwargs):
        super().setup(*args, **kwargs)
        self._set_up = True


class Stream(IterableDataset):
    """Data that do not say how many they are."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class StopsAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = pl_module.batches >= self.batches


def of_rollouts():
    return PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)


def of_a_probe():
    return PlasticityMonitor(tiny_llama(seed=1), PROBE, pass_at=(1,), sites=None, rank_sites=None)


def trainer_of(*callbacks, **options):
    settings = {"max_epochs": 1, "log_every_n_steps": 2, **options}
    return Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )


def alarms_of(trainer, module, *, batches=8, stream=False, ckpt_path=None):
    """The texts of the alarms that a fit raises."""
    rows = torch.randint(1, 23, (4 * batches, 8), generator=torch.Generator().manual_seed(2))
    data = DataLoader(Stream(rows) if stream else rows, batch_size=4)
    torch.manual_seed(1)  # of the rewards, which say where the training goes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    texts = [str(w.message) for w in caught]
    return [text.split(" at ")[0].split(" from ")[0] for text in texts if " nats, " in text]


FALL, LOW = "Token entropy fell", "RL started"


@pytest.mark.parametrize(
    ("options", "stream", "known"),
    [
        ({}, False, True),
        ({"max_steps": 8}, True, True),
        ({"max_epochs": -1, "max_steps": 8}, False, True),
        ({}, True, False),
        ({"max_epochs": -1}, False, False),
        ({"reload_dataloaders_every_n_epochs": 1}, False, False),
    ],
)
def test_a_fall_is_early_only_where_the_length_of_the_run_is_known(options, stream, known):
    callbacks = [PlasticityCallback(of_rollouts()), StopsAfter(8)]
    found = alarms_of(trainer_of(*callbacks, **options), Policy([0.5, 0.2]), stream=stream)
    assert found == [FALL] * known


@pytest.mark.parametrize(("changes", "known"), [({0: 1}, True), ({0: 1, 1: 4}, False)])
def test_accumulation_that_changes_on_the_way_makes_the_length_unknown(changes, known):
    callbacks = [PlasticityCallback(of_rollouts()), GradientAccumulationScheduler(changes)]
    assert alarms_of(trainer_of(*callbacks, max_epochs=2), Policy([0.5, 0.2])) == [FALL] * known


@pytest.mark.parametrize(("before", "early"), [(1, True), (2, True), (3, False), (4, False)])
def test_with_manual_optimization_the_steps_of_all_optimizers_count(before, early):
    """Two optimizers step in each of eight batches, as ``max_steps`` counts; the data would last for longer."""
    policy = Policy([0.5] * before + [0.2], manual=True)
    trainer = trainer_of(PlasticityCallback(of_rollouts()), max_steps=16)
    assert alarms_of(trainer, policy, batches=40) == [FALL] * early
    assert policy.batches == 8


def test_with_manual_optimization_and_no_limit_on_steps_no_fall_is_early():
    trainer = trainer_of(PlasticityCallback(of_rollouts()))
    assert alarms_of(trainer, Policy([0.5, 0.2], manual=True)) == []


@pytest.mark.parametrize(("batch", "early"), [(11, True), (12, False)])
def test_updates_count_where_gradients_are_accumulated(batch, early):
    """32 batches are eight updates: two have been made before batch 11, three before batch 12."""
    trainer = trainer_of(PlasticityCallback(of_rollouts()), accumulate_grad_batches=4)
    assert alarms_of(trainer, Policy([0.5] * batch + [0.2]), batches=32) == [FALL] * early


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {}])
def test_a_low_start_is_told_whatever_the_length(options):
    policy = Policy()
    policy.model.get_output_embeddings().weight.data.mul_(60)
    callbacks = [PlasticityCallback(of_a_probe(), 1, figure_every_n_steps=0), StopsAfter(3)]
    assert alarms_of(trainer_of(*callbacks, **options), policy) == [LOW]


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_what_is_no_number_is_not_where_the_entropy_began(first):
    trainer = trainer_of(PlasticityCallback(of_rollouts()))
    assert alarms_of(trainer, Policy([first, 0.5, 0.2])) == [FALL]


def test_what_is_no_number_raises_no_alarm():
    alarms = EntropyAlarms()
    assert [list(alarms.watch("probe", e, 0.1, 1.0, False)) for e in (-math.inf, math.nan, 0.5)] == [[]] * 3


def interrupted(monitor, policy, path, *others, steps=4):
    """The alarms of a fit that saves and ends after so many steps."""
    callback = PlasticityCallback(monitor, 1, figure_every_n_steps=0)
    trainer = trainer_of(callback, *others, max_steps=steps, max_epochs=-1)
    found = alarms_of(trainer, policy)
    trainer.save_checkpoint(path)
    return found


def resumed(monitor, policy, path, *others, steps=32):
    callback = PlasticityCallback(monitor, 1, figure_every_n_steps=0)
    trainer = trainer_of(callback, *others, max_steps=steps, max_epochs=-1)
    return alarms_of(trainer, policy, batches=32, ckpt_path=path)


@pytest.mark.parametrize("saved", [True, False])
def test_a_resumed_run_did_not_start_at_the_entropy_that_it_came_to(saved, tmp_path):
    path = tmp_path / "run.ckpt"
    assert interrupted(of_a_probe(), Policy(), path, Sharpens()) == []
    if not saved:
        _without_state(path)
    assert resumed(of_a_probe(), Policy(), path, steps=6) == []


def _without_state(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, path)


def test_what_is_first_seen_after_a_resume_is_no_start_after_the_next_one(tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    interrupted(of_a_probe(), Policy(), first, Sharpens())
    _without_state(first)
    trainer = trainer_of(
        PlasticityCallback(of_a_probe(), 1, figure_every_n_steps=0), max_steps=5, max_epochs=-1
    )
    assert alarms_of(trainer, Policy(), ckpt_path=first) == []
    trainer.save_checkpoint(second)
    assert resumed(of_a_probe(), Policy(), second, steps=7) == []


def test_a_fall_across_a_resume_is_told(tmp_path):
    path = tmp_path / "run.ckpt"
    assert interrupted(of_rollouts(), Policy([0.5]), path) == []
    assert resumed(of_rollouts(), Policy([0.2]), path) == [FALL]
    _without_state(path)
    assert resumed(of_rollouts(), Policy([0.2]), path) == []


@pytest.mark.parametrize("kind", ["rollouts", "probe"])
def test_a_resumed_run_raises_no_alarm_again(kind, tmp_path):
    path = tmp_path / "run.ckpt"
    policy = Policy([0.5, 0.2] if kind == "rollouts" else None)
    if kind == "probe":
        policy.model.get_output_embeddings().weight.data.mul_(60)
    make, alarm = (of_rollouts, FALL) if kind == "rollouts" else (of_a_probe, LOW)
    assert interrupted(make(), policy, path, StopsAfter(4), steps=32) == [alarm]
    assert resumed(make(), Policy([0.2]), path, steps=40) == []


def test_a_second_fit_of_a_trainer_goes_on_and_a_new_trainer_starts_afresh():
    callback = PlasticityCallback(of_rollouts())
    trainer = trainer_of(callback)
    assert alarms_of(trainer, Policy([0.5])) == []
    trainer.fit_loop.max_epochs = 8
    assert alarms_of(trainer, Policy([0.2])) == [FALL]
    assert alarms_of(trainer_of(callback), Policy([0.2])) == []
    assert alarms_of(trainer_of(callback), Policy([0.5, 0.2])) == [FALL]


def test_a_checkpoint_without_state_does_not_leave_that_of_another_run(tmp_path):
    """The same Trainer, which goes on with a run that had no such callback."""
    path = tmp_path / "run.ckpt"
    interrupted(of_rollouts(), Policy([0.2]), path)
    _without_state(path)
    trainer = trainer_of(PlasticityCallback(of_rollouts()), max_epochs=4)
    assert alarms_of(trainer, Policy([0.5]), batches=1) == []
    assert alarms_of(trainer, Policy([0.2]), ckpt_path=path) == []


def test_that_a_run_was_rejuvenated_survives_a_resume_without_the_callback_that_did_it(tmp_path):
    path = tmp_path / "run.ckpt"
    interrupted(of_a_probe(), Policy(), path, Rejuvenated())
    trainer = trainer_of(
        PlasticityCallback(of_a_probe(), 1, figure_every_n_steps=0), max_steps=5, max_epochs=-1
    )
    alarms_of(trainer, Policy(), ckpt_path=path)
    assert trainer.callback_metrics["plasticity/rejuvenated"] == 1
    _without_state(path)
    trainer = trainer_of(
        PlasticityCallback(of_a_probe(), 1, figure_every_n_steps=0), max_steps=5, max_epochs=-1
    )
    alarms_of(trainer, Policy(), ckpt_path=path)
    assert trainer.callback_metrics["plasticity/rejuvenated"] == 0


def test_two_callbacks_of_a_trainer_keep_their_own_state(tmp_path):
    path = tmp_path / "run.ckpt"

    def two():
        return [
            PlasticityCallback(of_rollouts()),
            PlasticityCallback(of_a_probe(), 1, figure_every_n_steps=0),
        ]

    trainer = trainer_of(*two(), max_steps=4, max_epochs=-1)
    alarms_of(trainer, Policy([0.5]))
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert {key: list(state["alarms"]["initial"]) for key, state in saved.items() if "Plasticity" in key} == {
        "PlasticityCallback": ["rollouts"],
        "PlasticityCallback-2": ["probe", "rollouts"],
    }
    trainer = trainer_of(*two(), max_steps=32, max_epochs=-1)
    assert alarms_of(trainer, Policy([0.2]), batches=32, ckpt_path=path) == [FALL] * 2


def test_the_alarms_of_a_copied_state_are_not_the_originals():
    alarms = EntropyAlarms()
    list(alarms.watch("rollouts", 0.5, 0.0, None, False))
    again = EntropyAlarms.restore(copy.deepcopy(alarms.state_dict()))
    assert [name for name, _ in again.watch("rollouts", 0.2, 0.1, None, False)] == ["entropy_fall"]
    assert alarms.state_dict()["raised"] == []
    assert again.state_dict() == {"initial": {"rollouts": [0.5, True]}, "raised": ["entropy_fall"]}
