"""What an edit meets in a fit: averages of the weights, half accumulated gradients, random states, old weights."""

from __future__ import annotations

import copy
import importlib.util
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.optim.swa_utils import AveragedModel

from lightning_rejuv import RejuvenationCallback, Reset
from lightning_rejuv.callbacks import AtStep
from lightning_rejuv.callbacks._training import Accumulation, LastingEdit
from tests.callbacks.modules import Calibrated, Line, equal, fit, line_anchor
from tests.callbacks.test_distributed import in_two_ranks
from tests.conftest import sharpened, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore:.*:FutureWarning")
DECAY = 0.8


def rejuvenation(**options):
    return RejuvenationCallback(line_anchor(), **options, alpha=0.3)


class Track(Callback):
    """The weights after every step, and those that a validation sees."""

    def __init__(self):
        self.stepped, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.stepped.append(copy.deepcopy(pl_module.model.state_dict()))

    def on_validation_start(self, trainer, pl_module):
        self.validated.append(len(self.stepped))


def mixed(a, b, share):
    """share * a + (1 - share) * b, in float64."""
    return {n: share * a[n].double() + (1 - share) * b[n].double() for n in a}


def expected(steps, start, edit_before, decay, first):
    """The average, anew: of weights that the edit has brought to where they would be on its side."""
    average, begun = {n: w.double() for n, w in start.items()}, False
    for number, weights in enumerate(steps):
        if number == edit_before:
            average = mixed(average, line_anchor(), 0.3)
        if number >= first:
            average = mixed(average, weights, decay) if begun else {n: w.double() for n, w in weights.items()}
            begun = True
    return average if len(steps) > edit_before else mixed(average, line_anchor(), 0.3)


def close(state, values):
    return all(torch.allclose(state[n].double(), w, atol=1e-6) for n, w in values.items())


@pytest.mark.parametrize("first", [0, 3, 100], ids=["from the first step", "later", "never"])
@pytest.mark.parametrize(
    ("moment", "before"), [({"at_start": True}, 0), ({"when": AtStep(5)}, 5), ({"at_end": True}, 12)]
)
def test_the_average_is_edited_with_the_model(moment, before, first, tmp_path):
    module, track = Line(), Track()
    start = copy.deepcopy(module.model.state_dict())
    averaging = EMAWeightAveraging(decay=DECAY, update_starting_at_step=first)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(module, averaging, track, rejuvenation(**moment), saver, tmp_path=tmp_path)
    value = expected(track.stepped, start, before, DECAY, first)
    assert close(module.model.state_dict(), value)
    if "at_end" in moment:
        saved = torch.load(tmp_path / "rejuvenated.ckpt", weights_only=True)["state_dict"]
        assert close({n.removeprefix("model."): w for n, w in saved.items()}, value)


def test_at_the_end_the_average_has_to_come_first(tmp_path):
    for moment in ({"at_end": True}, {"at_epoch": 1, "stop_after": True}):
        with pytest.raises(MisconfigurationException, match="Expected EMAWeightAveraging before Rejuv"):
            fit(Line(), rejuvenation(**moment), EMAWeightAveraging(), tmp_path=tmp_path)


def test_it_is_resumed_as_if_it_had_not_been_interrupted(tmp_path):
    def callbacks():
        return EMAWeightAveraging(decay=DECAY), rejuvenation(when=AtStep(3))

    whole, resumed = Line(), Line()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(whole, *callbacks(), saver, tmp_path=tmp_path)
    fit(resumed, *callbacks(), tmp_path=tmp_path, ckpt_path=tmp_path / "step=5.ckpt")
    assert equal(whole.model.state_dict(), resumed.model.state_dict())


def test_on_two_ranks(tmp_path):
    def work():
        module, track = Line(), Track()
        start = copy.deepcopy(module.model.state_dict())
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        averaging = EMAWeightAveraging(decay=DECAY)
        fit(module, averaging, track, rejuvenation(at_epoch=1), tmp_path=tmp_path, **options)
        return close(module.model.state_dict(), expected(track.stepped, start, 4, DECAY, 0))

    assert in_two_ranks(work) == {0: (True, None), 1: (True, None)}


class Shadow(Callback):
    """An average of one's own."""

    def __init__(self, hold):
        self.hold = hold

    def on_fit_start(self, trainer, pl_module):
        self.kept = self.hold(pl_module)


HOLDS = {
    "a copy of the module": lambda m: copy.deepcopy(m.model),
    "tensors by name": lambda m: {n: p.detach().clone() for n, p in m.named_parameters()},
    "a list of tensors": lambda m: [p.detach().clone() for p in m.parameters()],
    "an object": lambda m: Holder().take(m),
}


class Holder:
    def take(self, module):
        self.shadow_params = [p.detach().clone() for p in module.parameters()]
        return self


def warned_of(tmp_path, module, *callbacks):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, *callbacks, tmp_path=tmp_path, max_epochs=2)
    return [str(w.message) for w in caught if "second set" in str(w.message)]


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS.keys())
def test_copies_in_other_callbacks_are_named(hold, tmp_path):
    (message,) = warned_of(tmp_path, Line(), Shadow(hold), rejuvenation(at_epoch=1))
    assert "`Shadow.kept`" in message
    (message,) = warned_of(tmp_path, Line(), rejuvenation(at_epoch=1), Shadow(hold))


def test_what_is_no_copy_is_not_named(tmp_path):
    holds = (lambda m: m, lambda m: m.model, lambda m: m.trainer, lambda m: {"a": 1, "b": [torch.zeros(3)]})
    shadows = [type(f"Shadow{n}", (Shadow,), {})(hold) for n, hold in enumerate(holds)]
    assert warned_of(tmp_path, Line(), *shadows, rejuvenation(at_epoch=1)) == []


def test_an_average_inside_the_module_is_named(tmp_path):
    module = Line()
    module.ema = AveragedModel(module.model)
    module.language_model = module.model
    (message,) = warned_of(tmp_path, module, rejuvenation(at_epoch=1))
    assert "`Line.ema`" in message


class Undoing(torch.optim.Adam):
    """Writes back weights that it holds in a form which nobody else knows."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                packed = getattr(self, "packed", {}).get(p)
                if packed is not None:
                    p.data.copy_(packed.float() / 1024)
        self.packed = {
            p: (p.detach() * 1024).round().to(torch.int32) for g in self.param_groups for p in g["params"]
        }
        return loss


@pytest.mark.parametrize(("kind", "times"), [(Undoing, 1), (torch.optim.Adam, 0)])
def test_an_edit_that_does_not_last_is_said(kind, times, tmp_path):
    module = Line()
    module.configure_optimizers = lambda: kind(module.parameters(), lr=0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, rejuvenation(at_epoch=1), tmp_path=tmp_path)
    found = [str(w.message) for w in caught if "of the rejuvenation back" in str(w.message)]
    assert len(found) == times
    assert all("Undoing" in message for message in found)


def test_a_step_as_long_as_the_edit_is_no_sign_of_one_that_does_not_last(tmp_path):
    module = Line()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=1e-4)
    base = copy.deepcopy(module.model.state_dict())
    callback = RejuvenationCallback(base, alpha=0.9, at_epoch=1, optimizer_state="reset")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, callback, tmp_path=tmp_path)
    assert callback.rejuvenated_at == [4]
    assert not [w for w in caught if "of the rejuvenation back" in str(w.message)]


def _deepspeed(micro_steps, window):
    engine = SimpleNamespace(micro_steps=micro_steps, gradient_accumulation_steps=lambda: window)
    strategy = SimpleNamespace(handles_gradient_accumulation=True, model=engine)
    return SimpleNamespace(strategy=strategy, accumulate_grad_batches=window)


def test_deepspeed_counts_on_across_the_end_of_an_epoch():
    """Three batches an epoch and windows of two: the first batch of the second epoch ends a window."""
    accumulation = Accumulation()
    found = [accumulation.unfinished(_deepspeed(batch, 2), batch % 3) for batch in range(7)]
    assert found == [False, True, False, True, False, True, False]


def test_it_asks_for_names_that_deepspeed_has():
    """Its engine is not built here; its source is read where it is installed."""
    found = importlib.util.find_spec("deepspeed")
    if found is None:
        pytest.skip("DeepSpeed is not installed")
    source = (Path(found.origin).parent / "runtime" / "engine.py").read_text()
    assert "self.micro_steps += 1" in source
    assert "def gradient_accumulation_steps(self)" in source


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


def _said_of_an_edit(share, number):
    """Whether it is warned of an edit that update `number` after it takes a share of back; all others are small."""
    weight, trainer = (
        torch.nn.Parameter(torch.linspace(1, 2, 8)),
        SimpleNamespace(global_step=3, optimizers=[]),
    )
    layout = SimpleNamespace(sharded=False)
    lasting = LastingEdit(SimpleNamespace(layout=layout, parameters={"weight": weight}))
    edit = torch.linspace(-1, 1, 8)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight.add_(edit)
        lasting.begin(trainer)
        for update in range(1, 14):
            weight.sub_((share if update == number else 1e-3) * edit)
            trainer.global_step += 1
            if not lasting.goes_on(trainer):
                break
    return [f"The update to step {3 + number} took {share:.0%}" in str(w.message) for w in caught]


@pytest.mark.parametrize(("share", "said"), [(0.4, []), (0.6, [True]), (1.0, [True])])
def test_an_update_that_takes_more_than_half_of_the_edit_back_is_said(share, said):
    assert _said_of_an_edit(share, 1) == said


@pytest.mark.parametrize(("number", "said"), [(1, [True]), (9, [True]), (10, [True]), (11, [])])
def test_the_ten_updates_after_the_edit_are_watched(number, said):
    """The tenth too, which is compared with the eleventh."""
    assert _said_of_an_edit(0.8, number) == said
