"""How a model is run in a Trainer to decide what to edit: the data and samples of a module leave no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lightning_rejuv import RejuvenationCallback, Reset
from lightning_rejuv.callbacks import AtStep
from tests.callbacks.modules import Calibrated, fit
from tests.conftest import sharpened, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore:.*:FutureWarning")


class Drawing(Calibrated):
    """Draws from every generator there is, in its calibration data and in its samples."""

    def __init__(self, *args):
        super().__init__(*args)
        self.dtypes = []

    def _draw(self):
        self.dtypes.append(torch.get_default_dtype())
        random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002

    def calibration_dataloader(self):
        self._draw()
        return torch.utils.data.DataLoader(self._data[:2], batch_size=None, shuffle=True)

    def sample_responses(self, model):
        self._draw()
        return super().sample_responses(model)


class States(Callback):
    """The state of every generator at the start of the fit and of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, *_):
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        self.seen.append((python, numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()))

    def on_train_batch_start(self, *_):
        self.on_train_start()


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"alpha": "auto"}])
def test_no_random_state_moves(options, tmp_path):
    """Neither where the data are checked at the start of the fit, nor where the model is edited."""
    base = tiny_llama()
    module = Drawing(sharpened(base), base)
    before, after = States(), States()
    callback = RejuvenationCallback(base, when=AtStep(2), reset=Reset(fraction=0.1), **options)
    fit(module, before, callback, after, tmp_path=tmp_path, max_epochs=1)
    assert callback.rejuvenated_at == [2]
    assert len(module.dtypes) >= 2
    assert before.seen == after.seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_new_tensors_are_float32_whatever_the_precision(precision, tmp_path):
    """Lightning's plugins of true half precision change the default dtype; sums are not to be kept in it."""
    base = tiny_llama()
    module = Drawing(sharpened(base), base)
    callback = RejuvenationCallback(base, when=AtStep(2), alpha="auto", reset=Reset(fraction=0.1))
    fit(module, callback, tmp_path=tmp_path, max_epochs=1, precision=precision)
    assert callback.rejuvenated_at == [2]
    assert set(module.dtypes) == {torch.float32} == {torch.get_default_dtype()}
