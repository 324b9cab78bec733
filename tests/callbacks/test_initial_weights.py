"""`anchor="init"`: the weights at the start of the run, on disk once, also after a resume."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from lightning_rejuv import RejuvenationCallback, Reset
from lightning_rejuv.callbacks import AtStep, Every
from tests.callbacks.modules import Calibrated, Line, Snapshots, equal, fit, fused
from tests.callbacks.test_distributed import in_two_ranks
from tests.conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def from_init(**options):
    return RejuvenationCallback("init", **{"at_epoch": 1, "alpha": 0.3, **options})


def files(path):
    return sorted(path.rglob("initial-weights-*"))


def test_the_model_is_pulled_back_to_where_the_fit_started(tmp_path):
    module, callback, before, after = Line(), from_init(), Snapshots(), Snapshots()
    start = copy.deepcopy(module.model.state_dict())
    fit(module, before, callback, after, tmp_path=tmp_path)
    assert equal(after.taken[4], fused(before.taken[4], start, 0.3))
    (file,) = files(tmp_path)
    assert equal(start, {name.removeprefix("model."): w for name, w in load_file(file).items()})
    assert callback.report.anchor == str(file)
    assert len(pickle.dumps(vars(callback)["_run"])) < 500  # a path and a digest, no weights


def test_the_file_lies_beside_the_logs_and_is_named_after_its_content(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = from_init()
    fit(Line(), callback, tmp_path=tmp_path, logger=logger, max_epochs=2)
    (file,) = files(tmp_path)
    assert file.parent == tmp_path / "lightning_logs" / "version_0"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.name == f"initial-weights-{digest[:12]}.safetensors"
    record = callback.state_dict()["initial_weights"]
    assert record == {"path": str(file), "digest": digest}


def test_runs_in_one_directory_keep_their_own(tmp_path):
    other = Line()
    with torch.no_grad():
        other.model[0].weight.add_(1)
    for module in (Line(), other, Line()):
        fit(module, from_init(), tmp_path=tmp_path, max_epochs=2)
    assert len(files(tmp_path)) == 2


def _interrupted(tmp_path, **options):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = Snapshots()
    fit(Line(), from_init(**options), whole, saver, tmp_path=tmp_path)
    return whole.taken, tmp_path / "step=3.ckpt"


@pytest.mark.parametrize("options", [{"at_epoch": 1}, {"at_epoch": None, "when": Every(steps=2)}])
def test_a_resumed_run_finds_it_again(options, tmp_path):
    whole, path = _interrupted(tmp_path, **options)
    again = Snapshots()
    elsewhere = tmp_path / "elsewhere"
    fit(Line(), from_init(**options), again, tmp_path=elsewhere, ckpt_path=path)
    assert all(equal(a, b) for a, b in zip(whole[3:], again.taken, strict=True))
    assert len(files(tmp_path)) == 1


def test_a_resumed_run_refuses_another_file_or_none(tmp_path):
    _, path = _interrupted(tmp_path)
    (file,) = files(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\0")
    with pytest.raises(MisconfigurationException, match=r"resumed run .* has changed: its SHA-256 is not"):
        fit(Line(), from_init(), tmp_path=tmp_path, ckpt_path=path)
    file.unlink()
    with pytest.raises(MisconfigurationException, match=rf"{file.name}' is gone. Pass the path"):
        fit(Line(), from_init(), tmp_path=tmp_path, ckpt_path=path)
    # The file itself serves as any anchor does.
    file.write_bytes(content)
    moved = file.rename(tmp_path / "moved.safetensors")
    callback = RejuvenationCallback(str(moved), at_epoch=1, alpha=0.5)
    fit(Line(), callback, tmp_path=tmp_path, ckpt_path=path)
    assert callback.rejuvenated_at == [4]
    # Done, it is not needed any more.
    done = from_init()
    fit(Line(), done, tmp_path=tmp_path, ckpt_path=tmp_path / "step=6.ckpt")
    assert done.rejuvenated_at == [4]


def test_a_run_that_did_not_write_it_down_is_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(Line(), saver, tmp_path=tmp_path)
    with pytest.raises(MisconfigurationException, match="did not write them down"):
        fit(Line(), from_init(), tmp_path=tmp_path, ckpt_path=tmp_path / "step=3.ckpt")


def test_there_has_to_be_something_to_pull_back(tmp_path):
    with pytest.raises(MisconfigurationException, match="nothing to pull back"):
        RejuvenationCallback("init", at_start=True, alpha=0.5)
    for options in (
        {"at_epoch": 0},
        {"at_epoch": None, "when": AtStep(0)},
        {"at_epoch": 0, "stop_after": True},
    ):
        with pytest.raises(MisconfigurationException, match="nothing to pull back"):
            fit(Line(), from_init(**options), tmp_path=tmp_path)
    assert files(tmp_path) == []
    last = from_init(at_epoch=None, at_end=True)
    fit(Line(), last, tmp_path=tmp_path)
    assert last.rejuvenated_at == [12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_and_bfloat16_parameters(dtype, tmp_path):
    base = tiny_llama(dtype=dtype, tie_word_embeddings=True)
    module = Calibrated(copy.deepcopy(base), tiny_llama())
    callback = from_init(at_epoch=None, when=AtStep(2))
    fit(module, callback, tmp_path=tmp_path, max_epochs=1)
    (file,) = files(tmp_path)
    found = load_file(file)
    assert equal(found, dict(base.named_parameters()))
    assert "lm_head.weight" not in found


def test_adapters_carry_their_base(tmp_path):
    peft = pytest.importorskip("peft")
    module = Calibrated(tiny_llama(), tiny_llama())
    module.model = peft.get_peft_model(module.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(MisconfigurationException, match="anchor=None"):
        fit(module, from_init(), tmp_path=tmp_path)


def test_they_need_a_local_directory():
    with pytest.raises(MisconfigurationException, match=r"Expected a local log directory .* 'memory://run'"):
        fit(Line(), from_init(), tmp_path="memory://run")


def test_a_failing_write_ends_all_ranks_and_leaves_no_file(tmp_path):
    def train():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no space left") as caught:
            patch.setattr("lightning_rejuv.callbacks._initial_weights.os.fsync", _full)
            fit(Line(), from_init(), tmp_path=tmp_path, strategy="ddp", devices=2)
        return str(caught.value)

    found = in_two_ranks(train)
    assert [error for _, error in found.values()] == [None, None]
    assert str(tmp_path) in found[1][0] == found[0][0]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def _full(*args):
    raise OSError("no space left on device")


def test_rank_zero_writes_for_all(tmp_path):
    def train():
        callback, after = from_init(), Snapshots()
        fit(Line(), callback, after, tmp_path=tmp_path, strategy="ddp", devices=2)
        weights = {name: tensor.tolist() for name, tensor in after.taken[-1].items()}
        return callback.rejuvenated_at, callback.report.anchor, weights

    found = in_two_ranks(train)
    assert [error for _, error in found.values()] == [None, None]
    assert found[0][0] == found[1][0]
    (file,) = files(tmp_path)
    assert Path(found[0][0][1]) == file


class Refusing(Callback):
    def on_train_start(self, trainer, pl_module):
        raise MisconfigurationException("not like this")


REFUSALS = {
    "by its own checks": (lambda: from_init(alpha={"nowhere.*": 0.5}), None, "no parameter fits"),
    "for want of data": (lambda: from_init(reset=Reset(fraction=0.1)), None, "does not know the family"),
    "by another callback": (from_init, Refusing, "not like this"),
}


@pytest.mark.parametrize(("make", "other", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_fit_leaves_no_weights_behind(make, other, message, tmp_path):
    others = [] if other is None else [other()]
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(Line(), make(), *others, tmp_path=tmp_path)
    assert list(tmp_path.rglob("initial-weights*")) == []
    fit(Line(), from_init(), tmp_path=tmp_path)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(Line(), make(), *others, tmp_path=tmp_path)
    assert len(files(tmp_path)) == 1  # the other run's, which has the same initial weights


def test_a_fit_that_fails_later_keeps_them_for_its_resume(tmp_path):
    class Failing(Line):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="stop"):
        fit(Failing(), from_init(), tmp_path=tmp_path)
    assert len(files(tmp_path)) == 1


def test_trying_a_few_batches_leaves_the_file_of_a_run_alone(tmp_path):
    fit(Line(), from_init(), tmp_path=tmp_path)
    (file,) = files(tmp_path)
    fit(Line(), from_init(), tmp_path=tmp_path, fast_dev_run=2)
    assert files(tmp_path) == [file]
