from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_rejuv import RejuvenationCallback, rejuvenate
from lightning_rejuv.callbacks.triggers import AtStart, AtStep, Every, WhenMetric
from tests.conftest import greedy_batch, sharpened, tiny_llama


class Module(LightningModule):
    """A Hugging Face model, trained on its own greedy samples: four batches an epoch."""

    def __init__(self, model, base):
        super().__init__()
        self.model = model
        self._data = [greedy_batch(base, seed=seed) for seed in range(4)]

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self._data, batch_size=None)


class Calibrated(Module):
    def calibration_dataloader(self):
        return self._data[:2]

    def sample_responses(self):
        self.sampled_from = copy.deepcopy(self.model.state_dict())
        return self._data[2:]


class Snapshots(Callback):
    """The weights that each batch's update starts from; placed after the callback under test."""

    def __init__(self):
        self.taken = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.taken.append(copy.deepcopy(pl_module.model.state_dict()))


def _fit(module, *callbacks, tmp_path, ckpt_path=None, **options):
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **{
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            **options,
        },
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


def _equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_at_start_it_does_what_the_function_does_before_the_first_update(pair, tmp_path):
    base, sft = pair
    expected, module, snapshots = copy.deepcopy(sft), Calibrated(sft, base), Snapshots()
    callback = RejuvenationCallback(base, at_start=True, alpha=0.4, reset_fraction=0.05)
    _fit(module, callback, snapshots, tmp_path=tmp_path)
    report = rejuvenate(expected, base, module.calibration_dataloader(), alpha=0.4, reset_fraction=0.05)
    assert _equal(snapshots.taken[0], expected.state_dict())
    assert not _equal(snapshots.taken[1], snapshots.taken[0])
    assert callback.report is not None
    assert callback.report.drift_after == report.drift_after
    assert callback.report.neurons_reset == report.neurons_reset > 0


def test_at_epoch_it_happens_once_and_only_there(pair, tmp_path):
    base, sft = pair
    plain, edited = Snapshots(), Snapshots()
    _fit(Calibrated(copy.deepcopy(sft), base), plain, tmp_path=tmp_path)
    callback = RejuvenationCallback(base, at_epoch=1, alpha=0.5, reset_fraction=0)
    _fit(Calibrated(copy.deepcopy(sft), base), callback, edited, tmp_path=tmp_path)
    for step in range(4):  # an un-fired callback does not touch the trajectory
        assert _equal(plain.taken[step], edited.taken[step])
    expected = copy.deepcopy(sft)
    expected.load_state_dict(plain.taken[4])
    rejuvenate(expected, base, alpha=0.5, reset_fraction=0)
    assert _equal(edited.taken[4], expected.state_dict())

    def drift(state):
        return sum(float((state[k] - v).square().sum()) for k, v in base.state_dict().items())

    assert all(drift(edited.taken[step]) > 0.9 * drift(edited.taken[4]) for step in range(5, 12))


@pytest.mark.parametrize(
    "options", [{"every_n_train_steps": 4}, {"every_n_train_steps": 6}, {"every_n_epochs": 1}]
)
def test_after_a_resume_it_is_not_done_again(pair, tmp_path, options):
    base, sft = pair

    def module():
        made = Calibrated(copy.deepcopy(sft), base)
        made._data = made._data[:1] * 4  # a list cannot resume in the middle of an epoch
        return made

    for at, when in (("before", {"at_epoch": 2}), ("after", {"at_start": True})):
        whole, resumed = Snapshots(), Snapshots()
        checkpoint = ModelCheckpoint(tmp_path / at, filename="{step}", save_top_k=-1, **options)
        callback = RejuvenationCallback(base, **when, alpha=0.5, reset_fraction=0)
        _fit(module(), callback, whole, checkpoint, tmp_path=tmp_path)
        path = min((tmp_path / at).iterdir(), key=lambda p: int(p.stem.split("=")[1]))
        again = RejuvenationCallback(base, **when, alpha=0.5, reset_fraction=0)
        _fit(module(), again, resumed, tmp_path=tmp_path, ckpt_path=path)
        steps = len(resumed.taken)
        assert 0 < steps < 12
        assert all(_equal(a, b) for a, b in zip(whole.taken[-steps:], resumed.taken, strict=True))
        assert (again.report is None) == (at == "after")


class Logged(Calibrated):
    """Logs a metric that falls by 0.1 at every validation, from 0.9 on."""

    def on_validation_epoch_end(self):
        self.value = getattr(self, "value", 1.0) - 0.1
        self.log("entropy", self.value)

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return torch.utils.data.DataLoader([0], batch_size=None)


def _edited_at(module, callback, tmp_path, **options):
    """Batches before whose update the drift from the base collapsed."""

    class Watch(Callback):
        def __init__(self):
            self.reports, self.at, self.batch = [], [], 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if callback.report is not None and all(callback.report is not r for r in self.reports):
                self.reports.append(callback.report)
                self.at.append(self.batch)
            self.batch += 1

    watch = Watch()
    _fit(module, callback, watch, tmp_path=tmp_path, **options)
    return watch.at


# Four batches an epoch; validated after the epochs 0, 1, 2 with 0.9, 0.8, 0.7. What is seen then is acted upon
# before the next batch, so that the last look comes too late.
TRIGGERS = {
    "step": (AtStep(6), [6]),
    "every 5 steps": (Every(steps=5), [5, 10]),
    "every epoch": (Every(epochs=1), [4, 8]),
    "below 0.75": (WhenMetric("entropy", 0.75), []),
    "below 0.85": (WhenMetric("entropy", 0.85), [8]),
    "below 0.95 twice": (WhenMetric("entropy", 0.95, patience=2), [8]),
    "above 0.85": (WhenMetric("entropy", 0.85, mode="max"), [4]),
}


@pytest.mark.parametrize(("trigger", "expected"), TRIGGERS.values(), ids=TRIGGERS.keys())
def test_every_trigger_fires_when_it_should(pair, tmp_path, trigger, expected):
    base, sft = pair
    callback = RejuvenationCallback(base, when=trigger, alpha=0.5, reset_fraction=0)
    assert _edited_at(Logged(sft, base), callback, tmp_path, num_sanity_val_steps=0) == expected


def test_a_metric_without_validation_is_looked_at_after_each_epoch(pair, tmp_path):
    class Trained(Calibrated):
        def on_train_epoch_start(self):
            self.log("entropy", 1.0 / (1 + self.current_epoch))

    base, sft = pair
    callback = RejuvenationCallback(base, when=WhenMetric("entropy", 0.6), alpha=0.5, reset_fraction=0)
    assert _edited_at(Trained(sft, base), callback, tmp_path) == [8]


def test_an_unknown_metric_is_named_with_the_known_ones(pair, tmp_path):
    base, sft = pair
    callback = RejuvenationCallback(base, when=WhenMetric("entropi", 0.6), reset_fraction=0)
    with pytest.raises(RuntimeError, match=r"'entropi' .* Known: \['entropy'\]"):
        _fit(Logged(sft, base), callback, tmp_path=tmp_path)


def test_a_repeating_trigger_goes_on_after_a_resume(pair, tmp_path):
    base, sft = pair
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=6)
    callback = RejuvenationCallback(base, when=Every(steps=5), alpha=0.5, reset_fraction=0)
    _fit(Calibrated(copy.deepcopy(sft), base), callback, checkpoint, tmp_path=tmp_path)
    again = RejuvenationCallback(base, when=Every(steps=5), alpha=0.5, reset_fraction=0)
    path = tmp_path / "ckpt" / "step=6.ckpt"
    assert _edited_at(Calibrated(copy.deepcopy(sft), base), again, tmp_path, ckpt_path=path) == [4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: AtStep(-1),
        lambda: Every(),
        lambda: Every(epochs=1, steps=1),
        lambda: Every(steps=0),
        lambda: WhenMetric("entropy", float("nan")),
        lambda: WhenMetric("entropy", 0.1, mode="low"),
        lambda: WhenMetric("entropy", 0.1, patience=0),
    ],
)
def test_bad_triggers_are_refused_at_construction(make):
    with pytest.raises(MisconfigurationException, match="Expected"):
        make()


def test_a_second_fit_is_a_new_run(pair, tmp_path):
    base, sft = pair
    callback = RejuvenationCallback(base, at_start=True, alpha=0.5, reset_fraction=0)
    for _ in range(2):
        snapshots = Snapshots()
        module = Calibrated(copy.deepcopy(sft), base)
        _fit(module, callback, snapshots, tmp_path=tmp_path, max_epochs=1)
        assert not _equal(snapshots.taken[0], sft.state_dict())


def test_it_waits_for_the_end_of_an_accumulation(pair, tmp_path):
    """A run that resumes in the middle of an epoch may be in the middle of an accumulation as well."""
    base, sft = pair
    callback = RejuvenationCallback(base, at_start=True, alpha=0.5, reset_fraction=0)
    module = Calibrated(sft, base)
    trainer = Trainer(
        default_root_dir=tmp_path, accumulate_grad_batches=2, logger=False, enable_checkpointing=False
    )
    before = copy.deepcopy(sft.state_dict())
    callback.on_train_batch_start(trainer, module, None, 1)
    assert _equal(before, sft.state_dict())
    callback.on_train_batch_start(trainer, module, None, 2)
    assert not _equal(before, sft.state_dict())


def test_automatic_alpha_samples_from_the_anchor(pair, tmp_path):
    base, sft = pair
    module = Calibrated(sft, base)
    callback = RejuvenationCallback(base, at_start=True, alpha="auto", reset_fraction=0, alpha_target=0.2)
    _fit(module, callback, tmp_path=tmp_path, max_epochs=1)
    assert _equal(module.sampled_from, base.state_dict())
    assert callback.report is not None
    assert callback.report.search is not None
    assert 0 < callback.report.alpha < 1


def test_an_anchor_on_disk_and_a_report_beside_the_logs(pair, tmp_path):
    base, sft = pair
    base.save_pretrained(tmp_path / "base")
    callback = RejuvenationCallback(str(tmp_path / "base"), at_start=True, alpha=0.5)
    logger = CSVLogger(tmp_path, name="logs")
    _fit(Calibrated(sft, base), callback, tmp_path=tmp_path, max_epochs=1, logger=logger)
    report = json.loads((tmp_path / "logs" / "version_0" / "rejuvenation.json").read_text())
    assert report["anchor"] == str(tmp_path / "base")
    metrics = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
    assert "rejuvenation/drift_after" in metrics.splitlines()[0]


OPTIONS = {
    "alpha": (0.2, 0.8),
    "reset_fraction": (0.02, 0.4),
    "omega": (1.0, 0.5),
    "positions": ("sharpened", "entropy_gap"),
    "positions_per_response": (1, 4),
    "rank_by": ("absolute", "random"),
    "scope": ("model", "module"),
    "calibration": (None, [greedy_batch(tiny_llama(), seed=s) for s in (8, 9)]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_ignored(pair, tmp_path, name):
    base, sft = pair
    results = []
    for value in OPTIONS[name]:
        snapshots = Snapshots()
        options = {"at_start": True, "reset_fraction": 0.1, name: value}
        module = Calibrated(copy.deepcopy(sft), base)
        if name == "positions":  # tokens that the base does not know, so that the two rules differ
            module._data[0]["input_ids"][:, 4:] = torch.arange(5) + torch.arange(3)[:, None]
            module._data[0]["labels"] = module._data[0]["input_ids"].clone()
        _fit(module, RejuvenationCallback(base, **options), snapshots, tmp_path=tmp_path, max_epochs=1)
        results.append(snapshots.taken[0])
    assert not _equal(*results)


@pytest.mark.parametrize(
    "when", [{}, {"at_start": True, "at_epoch": 1}, {"at_start": True, "when": AtStart()}]
)
def test_it_has_to_be_said_when(when):
    with pytest.raises(MisconfigurationException, match="exactly one of `at_start=True`, `at_epoch="):
        RejuvenationCallback("base", **when)


def test_options_are_checked_at_construction():
    with pytest.raises(ValueError, match="`alpha`"):
        RejuvenationCallback("base", at_start=True, alpha=3)
    with pytest.raises(MisconfigurationException, match="`epoch`"):
        RejuvenationCallback("base", at_epoch=-1)
    with pytest.raises(TypeError, match="aplha"):
        RejuvenationCallback("base", at_start=True, aplha=0.5)


def test_what_cannot_work_is_refused_before_training(pair, tmp_path):
    base, sft = pair
    other = tiny_llama(hidden_size=32)
    cases = [
        (Module, {"at_start": True}, MisconfigurationException, "needs calibration data"),
        (
            Module,
            {"at_start": True, "reset_fraction": 0, "alpha": "auto"},
            MisconfigurationException,
            "needs calibration",
        ),
        (Calibrated, {"at_epoch": 3}, MisconfigurationException, "can never come"),
        (Calibrated, {"when": AtStep(12)}, MisconfigurationException, "can never come"),
        (Calibrated, {"at_epoch": 2, "anchor": "nowhere"}, FileNotFoundError, "no such file"),
        (Calibrated, {"at_epoch": 2, "anchor": other}, ValueError, "to have shape"),
        (Calibrated, {"at_epoch": 2, "calibration": []}, ValueError, "iterable is empty"),
    ]
    for kind, options, error, message in cases:
        snapshots = Snapshots()
        with pytest.raises(error, match=message):
            _fit(
                kind(copy.deepcopy(sft), base),
                RejuvenationCallback(**{"anchor": base, **options}),
                snapshots,
                tmp_path=tmp_path,
            )
        assert snapshots.taken == []
