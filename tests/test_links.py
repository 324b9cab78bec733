"""What is prepared beside its final name does not go through a link that stands there."""

from __future__ import annotations

import os

import pytest
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import nn

from lightning_rejuv import RejuvenationCallback, rejuvenate
from tests.callbacks.modules import Line


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "thesis.tex"
    path.write_text("years")
    yield path
    assert path.read_text() == "years"


def test_a_report(tmp_path, victim):
    report = rejuvenate(nn.Linear(2, 2), nn.Linear(2, 2), alpha=0.5)
    for name in ("report.json.part", "report.json"):
        (tmp_path / name).symlink_to(victim)
    report.save(tmp_path / "report.json")
    assert "alpha" in (tmp_path / "report.json").read_text()
    assert not (tmp_path / "report.json").is_symlink()
    assert not os.path.lexists(tmp_path / "report.json.part")


def test_initial_weights(tmp_path, victim):
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    module, logs = Line(validates=False), tmp_path / "logs"
    logs.mkdir()
    (logs / f"initial-weights-{os.getpid()}.part").symlink_to(victim)
    callback = RejuvenationCallback("init", at_end=True, alpha=0.5)
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=logs, callbacks=[callback], **quiet)
    trainer.fit(module)
    (file,) = logs.glob("initial-weights-*.safetensors")
    assert set(load_file(file)) == set(module.state_dict())
