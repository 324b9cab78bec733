"""Files that cannot be written and loggers that fail lose neither the edit nor its report."""

from __future__ import annotations

import errno
import os
import warnings

import pytest
from lightning.fabric.utilities.rank_zero import WarningCache
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_rejuv import RejuvenationCallback
from lightning_rejuv.callbacks import AtStep
from lightning_rejuv.report.report import RejuvenationReport
from tests.callbacks.modules import Line, fit, line_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
MOMENTS = [{"at_start": True}, {"when": AtStep(3)}, {"at_end": True}]


def rejuvenation(**options):
    return RejuvenationCallback(line_anchor(), **options, alpha=0.3)


def fitted(callback, *others, tmp_path, **options):
    """What was warned of, each with the number of updates before it."""
    module, said = Line(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, callback, *others, tmp_path=tmp_path, max_epochs=1, **options)
    said = [str(w.message) for w in caught]
    assert trainer.global_step == 4
    assert len(callback.rejuvenated_at) == 1
    assert 0 < callback.report.drift_after < callback.report.drift_before
    return said


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_directory_that_cannot_be_written_to(moment, tmp_path):
    (tmp_path / "file").write_text("x")
    said = fitted(rejuvenation(**moment), tmp_path=tmp_path / "file" / "logs")
    at_start = [m for m in said if "cannot be written to" in m and "`report`" in m]
    at_edit = [m for m in said if "could not be written to" in m and "NotADirectoryError" in m]
    assert (len(at_start), len(at_edit)) == (1, 1)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_is_full(moment, tmp_path, monkeypatch):
    def save(self, path):
        with open(path, "w") as file:
            file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RejuvenationReport, "save", save)
    said = fitted(rejuvenation(**moment), tmp_path=tmp_path)
    assert sum("No space left" in m and "`report`" in m for m in said) == 1
    assert not any("cannot be written" in m for m in said)
    assert list(tmp_path.glob("rejuvenation*")) == []  # nothing half written


def test_nothing_is_said_and_nothing_made_where_all_is_well(tmp_path):
    seen = []

    class Look(RejuvenationCallback):
        def on_train_batch_start(self, trainer, *args):
            seen.append((tmp_path / "new").exists())
            super().on_train_batch_start(trainer, *args)

    callback = Look(line_anchor(), when=AtStep(2), alpha=0.3)
    said = fitted(callback, tmp_path=tmp_path / "new" / "deep")
    assert not any("report" in m for m in said)
    assert seen[0] is False
    assert (tmp_path / "new" / "deep" / "rejuvenation.json").is_file()


def test_the_rejuvenated_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    whole = Trainer.save_checkpoint

    def save(self, path, *args, **kwargs):
        if os.fspath(path).endswith("/rejuvenated.ckpt"):
            raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")
        return whole(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    saver = ModelCheckpoint(tmp_path, filename="{step}")
    said = fitted(rejuvenation(at_end=True), saver, tmp_path=tmp_path)
    assert sum("rejuvenated model could not be written" in m for m in said) == 1


class Failing(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if any(name.startswith("rejuvenation") for name in metrics):
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_logger_that_fails(moment, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_rejuv.loggers._told", WarningCache())
    failing, other = Failing(tmp_path, name="failing"), CSVLogger(tmp_path, name="other")
    said = fitted(rejuvenation(**moment), tmp_path=tmp_path, logger=[failing, other])
    assert sum("Failing failed with ConnectionError: the server is gone" in m for m in said) == 1
    other.save()
    assert "rejuvenation/alpha" in (tmp_path / "other" / "version_0" / "metrics.csv").read_text()
