"""The callback in a Trainer: what it does when its moment comes, and what it refuses before it."""

from __future__ import annotations

import copy
import inspect
import json
import re
from dataclasses import fields
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from tqdm import tqdm

from lightning_rejuv import Refit, RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.callbacks import AtStart, AtStep
from tests.callbacks.modules import Calibrated, Module, Snapshots, equal, fit
from tests.conftest import OF_A_RESET, greedy_batch, nested, sharpened, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


def test_at_start_it_does_what_the_function_does_before_the_first_update(pair, tmp_path):
    base, sft = pair
    expected, module, snapshots = copy.deepcopy(sft), Calibrated(sft, base), Snapshots()
    callback = RejuvenationCallback(base, at_start=True, alpha=0.4, reset=Reset(fraction=0.05))
    fit(module, callback, snapshots, tmp_path=tmp_path)
    report = rejuvenate(
        expected, base, module.calibration_dataloader(), alpha=0.4, reset=Reset(fraction=0.05)
    )
    assert equal(snapshots.taken[0], expected.state_dict())
    assert not equal(snapshots.taken[1], snapshots.taken[0])
    assert callback.report is not None
    assert callback.report.drift_after == report.drift_after
    assert callback.report.neurons_reset == report.neurons_reset > 0


def test_automatic_alpha_samples_from_the_anchor(pair, tmp_path):
    base, sft = pair
    module = Calibrated(sft, base)
    callback = RejuvenationCallback(base, at_start=True, alpha="auto")
    fit(module, callback, tmp_path=tmp_path, max_epochs=1)
    assert equal(module.sampled_from, base.state_dict())
    assert callback.report is not None
    assert callback.report.search is not None
    assert 0 < callback.report.alpha < 1


@pytest.mark.parametrize("right", [True, False])
def test_a_module_that_verifies_has_the_alpha_that_was_found_checked(right, pair, tmp_path):
    """By responses that are sampled there; where none of a few is right, the report says so."""
    base, sft = pair

    class Verifying(Calibrated):
        def verify_responses(self, batch):
            seen.append((batch, self.sampled_from))
            return torch.full((len(batch["input_ids"]),), right)

    seen = []
    plain = RejuvenationCallback(base, at_start=True)
    fit(Calibrated(copy.deepcopy(sft), base), plain, tmp_path=tmp_path, max_epochs=1)
    module, callback = (
        Verifying(copy.deepcopy(sft), base),
        RejuvenationCallback(base, at_start=True),
    )
    fit(module, callback, tmp_path=tmp_path, max_epochs=1)
    search, found = callback.report.search, plain.report.search
    assert found.right is None
    assert search.right == float(right)
    assert search.alpha == callback.report.alpha == found.alpha
    assert len(seen) == 2  # batches
    expected = copy.deepcopy(sft)
    rejuvenate(expected, base, alpha=found.alpha)
    for batch, weights in seen:
        assert equal(weights, expected.state_dict())
        assert any(batch is own for own in module._data[2:])
    assert [doubt for doubt in search.doubts if "too few to tell" in doubt] == (
        [] if right else [search.doubts[-1]]
    )


def test_an_anchor_on_disk_and_a_report_beside_the_logs(pair, tmp_path):
    base, sft = pair
    base.save_pretrained(tmp_path / "base")
    callback = RejuvenationCallback(
        str(tmp_path / "base"), at_start=True, alpha=0.5, reset=Reset(fraction=0.1)
    )
    logger = CSVLogger(tmp_path, name="logs")
    fit(Calibrated(sft, base), callback, tmp_path=tmp_path, max_epochs=1, logger=logger)
    report = json.loads((tmp_path / "logs" / "version_0" / "rejuvenation.json").read_text())
    assert report["anchor"] == str(tmp_path / "base")
    metrics = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
    assert "rejuvenation/drift_after" in metrics.splitlines()[0]


def test_the_report_lies_beside_the_checkpoints(pair, tmp_path, caplog):
    base, sft = pair
    saver = ModelCheckpoint(tmp_path / "elsewhere")
    callback = RejuvenationCallback(base, when=AtStep(2), alpha=0.5, reset=Reset(fraction=0.1))
    with caplog.at_level("INFO"):
        fit(Calibrated(sft, base), callback, saver, tmp_path=tmp_path / "logs", max_epochs=1)
    names = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert names == {"rejuvenation.json", "epoch=0-step=4.ckpt"}
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Rejuvenated")]
    assert line == f"Rejuvenated before step 2, at step 2: {callback.report.summary()}"


@pytest.mark.parametrize("kind", ["tqdm", "rich", None])
def test_a_progress_bar_names_the_phases(kind, pair, tmp_path, capsys, monkeypatch):
    """Two batches: through the base and the model, and once more for the attribution."""
    base, sft = pair
    callbacks, shown = [RejuvenationCallback(base, at_start=True, alpha=0.5, reset=Reset(fraction=0.1))], []
    monkeypatch.setattr("tqdm.auto.tqdm", partial(tqdm, mininterval=0))
    if kind == "tqdm":
        callbacks.append(TQDMProgressBar())
    if kind == "rich":
        rich = pytest.importorskip("rich.progress")
        monkeypatch.setattr(rich.Progress, "refresh", lambda self: shown.append(_seen(self.tasks[-1])))
        callbacks.append(RichProgressBar())
    options = {"max_steps": 1, "enable_progress_bar": kind is not None}
    fit(Calibrated(sft, base), *callbacks, tmp_path=tmp_path, **options)
    expected = [("comparing with the base", done, 4) for done in range(5)]
    expected += [("attributing to neurons", done, 2) for done in range(3)]
    printed = re.findall(r"Rejuvenation: ([a-z ]+):.*?(\d+)/(\d+) ", capsys.readouterr().err)
    found = dict.fromkeys((phase, int(done), int(total)) for phase, done, total in printed)
    assert list(found) == (expected if kind == "tqdm" else [])
    told = [step for step in dict.fromkeys(shown) if step[0].startswith("Rejuvenation: ")]
    assert told == [(f"Rejuvenation: {phase}", *step) for phase, *step in expected if kind == "rich"]


def _seen(task):
    return task.description, task.completed, task.total


# One that differs from the default and shows in the weights, and what is needed for it to show.
OPTIONS = {
    "alpha": (0.2, {}),
    **{f"reset.{name}": value for name, value in OF_A_RESET.items()},
    "calibration": ([greedy_batch(tiny_llama(), seed=s) for s in (8, 9)], {}),
    "optimizer_state": ("keep", {}),
    "rounding": ("nearest", {}),
    "seed": (1, {"reset.rank_by": "random"}),
    "refit": (Refit(1), {}),
}
# What says when, and names and anchors, have tests of their own.
OTHERS = {
    *("self", "anchor", "at_start", "at_epoch", "at_end", "when", "stop_after", "name", "resize_vocabulary"),
}


def test_every_option_has_a_test():
    parameters = set(inspect.signature(RejuvenationCallback.__init__).parameters) - {"reset"}
    assert {*OPTIONS, *OTHERS} == parameters | {f"reset.{field.name}" for field in fields(Reset)}


class Momentum(Calibrated):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_ignored(pair, tmp_path, name):
    base, sft = pair
    value, needed = OPTIONS[name]
    results = []
    for options in (needed, {**needed, name: value}):
        module, snapshots = Momentum(copy.deepcopy(sft), base), Snapshots()
        if name == "reset.positions":  # tokens that the base does not know, so that the two rules differ
            module._data[0]["input_ids"][:, 4:] = torch.arange(5) + torch.arange(3)[:, None]
            module._data[0]["labels"] = module._data[0]["input_ids"].clone()
        settings = nested({"alpha": 0.5, "reset.fraction": 0.1, **options})
        fit(
            module,
            RejuvenationCallback(base, when=AtStep(1), **settings),
            snapshots,
            tmp_path=tmp_path,
            max_epochs=1,
            precision="bf16-true" if name == "rounding" else "32-true",
        )
        results.append(snapshots.taken[2 if name == "optimizer_state" else 1])
    assert not equal(*results)


def test_a_resized_vocabulary_needs_leave(pair, tmp_path):
    base, _ = pair
    larger = sharpened(tiny_llama(vocab_size=25))
    with pytest.raises(ValueError, match="`resize_vocabulary=True`"):
        fit(Calibrated(larger, base), RejuvenationCallback(base, at_start=True, alpha=0.5), tmp_path=tmp_path)
    new = larger.lm_head.weight[23:].clone()
    callback, snapshots = (
        RejuvenationCallback(
            base, at_start=True, resize_vocabulary=True, alpha=0.5, reset=Reset(fraction=0.1)
        ),
        Snapshots(),
    )
    fit(Calibrated(larger, base), callback, snapshots, tmp_path=tmp_path, max_epochs=1)
    assert torch.equal(snapshots.taken[0]["lm_head.weight"][23:], new)


@pytest.mark.parametrize(
    "when",
    [
        {},
        {"at_start": True, "at_epoch": 1},
        {"at_start": True, "when": AtStart()},
        {"at_end": True, "at_start": True},
        {"at_end": True, "at_epoch": 0},
    ],
)
def test_it_has_to_be_said_when(when):
    with pytest.raises(MisconfigurationException, match="exactly one of `at_start=True`, `at_epoch="):
        RejuvenationCallback("base", **when)


def test_options_are_checked_at_construction():
    with pytest.raises(ValueError, match="`alpha`"):
        RejuvenationCallback("base", at_start=True, alpha=3)
    with pytest.raises(MisconfigurationException, match="`at_epoch`"):
        RejuvenationCallback("base", at_epoch=-1)
    with pytest.raises(TypeError, match="aplha"):
        RejuvenationCallback("base", at_start=True, aplha=0.5)
    with pytest.raises(MisconfigurationException, match=r"read more than once.* Pass `list\(…\)` of it"):
        RejuvenationCallback("base", at_start=True, calibration=(batch for batch in []))
    with pytest.raises(MisconfigurationException, match="no `calibration` without .* no effect"):
        RejuvenationCallback("base", at_start=True, alpha=0.4, calibration=[])


EMPTY = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}
FOREIGN = {name: tensor + 23 * (tensor > 0) for name, tensor in greedy_batch(tiny_llama()).items()}
REFUSED = {
    "alpha patterns": (
        Calibrated,
        {"at_epoch": 2, "alpha": {"*.mpl.*": 0.3, "*": 0.5}},
        ValueError,
        r"no parameter fits \['\*.mpl.\*'\]",
    ),
    "another tokenizer": (
        Calibrated,
        {"at_epoch": 2, "calibration": [FOREIGN]},
        ValueError,
        "to lie in the model's vocabulary of 23 but got 4",
    ),
    "no calibration": (
        Module,
        {"at_start": True},
        MisconfigurationException,
        "Expected calibration data for `alpha='auto'` but",
    ),
    "no calibration for a reset": (
        Module,
        {"at_start": True, "alpha": 0.4, "reset": Reset(fraction=0.1)},
        MisconfigurationException,
        "Expected calibration data for `reset` but",
    ),
    "empty": (Calibrated, {"at_epoch": 2, "calibration": []}, ValueError, "iterable is empty"),
    "no responses": (
        Calibrated,
        {"at_end": True, "calibration": [EMPTY]},
        ValueError,
        "rows \\[0\\] have none",
    ),
    "no batches": (Calibrated, {"at_end": True, "calibration": [3]}, TypeError, "calibration batch 0"),
    "epoch": (Calibrated, {"at_epoch": 3}, MisconfigurationException, "can never come"),
    "step": (Calibrated, {"when": AtStep(12)}, MisconfigurationException, "can never come"),
    "no file": (Calibrated, {"at_epoch": 2, "anchor": "nowhere"}, FileNotFoundError, "no such file"),
    "no anchor": (
        Calibrated,
        {"at_end": True, "anchor": None},
        ValueError,
        "Expected an `anchor` but got None",
    ),
    "other shapes": (
        Calibrated,
        {"at_epoch": 2, "anchor": tiny_llama(hidden_size=32)},
        ValueError,
        "to have shape",
    ),
    "other names": (
        Calibrated,
        {"at_epoch": 2, "anchor": {"w": torch.ones(2)}},
        ValueError,
        r"Only in the model: \['lm_head.weight'.*Only in the anchor: \['w'\]",
    ),
}


@pytest.mark.parametrize(("kind", "options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_before_training(pair, tmp_path, kind, options, error, message):
    base, sft = pair
    snapshots = Snapshots()
    callback = RejuvenationCallback(**{"anchor": base, **options})
    with pytest.raises(error, match=message):
        fit(kind(copy.deepcopy(sft), base), callback, snapshots, tmp_path=tmp_path)
    assert snapshots.taken == []


def test_a_model_without_generate_needs_samples(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(23, 4)

        def forward(self, input_ids):
            return self.embedding(input_ids) @ self.embedding.weight.T

    class Sampled(Module):
        def training_step(self, batch, batch_idx):
            return self.model(batch["input_ids"]).sum()

    base, module = Net(), Sampled(Net(), tiny_llama())
    options = {"at_start": True, "alpha": "auto", "calibration": module._data[:1]}
    with pytest.raises(
        MisconfigurationException, match=r"has no `generate`: give Sampled .*sample_responses"
    ):
        fit(
            module,
            RejuvenationCallback({"embedding.weight": base.embedding.weight}, **options),
            tmp_path=tmp_path,
        )
