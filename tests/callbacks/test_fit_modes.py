"""The ways of running a Trainer and of training a model, beside the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_rejuv import RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.callbacks import AtStep, Every, WhenMetric
from lightning_rejuv.names import canonical_name
from tests.callbacks.modules import Calibrated, Line, Snapshots, equal, fit, fused, line_anchor
from tests.conftest import sharpened, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore:.*:FutureWarning")


def rejuvenation(**options):
    return RejuvenationCallback(line_anchor(), **{"alpha": 0.3, **options})


@pytest.mark.parametrize(
    "options", [{"at_start": True}, {"at_end": True}, {"at_end": True, "anchor": "init"}]
)
def test_fast_dev_run_edits_where_it_is_due_and_leaves_no_file(options, tmp_path):
    callback = RejuvenationCallback(**{"anchor": line_anchor(), "alpha": 0.5, **options})
    fit(Line(), callback, tmp_path=tmp_path, fast_dev_run=2)
    assert callback.rejuvenated_at == [0 if "at_start" in options else 2]
    assert not list(tmp_path.rglob("*.*"))


def test_fast_dev_run_checks_what_a_fit_would(tmp_path, caplog):
    module, plain = Line(), Line()
    fit(plain, tmp_path=tmp_path, fast_dev_run=2)
    with caplog.at_level("INFO"):
        for moment in ({"at_epoch": 2}, {"when": AtStep(100)}, {"when": WhenMetric("level", 0.1)}):
            module = Line()
            fit(module, rejuvenation(**moment), tmp_path=tmp_path, fast_dev_run=2)
            assert equal(module.model.state_dict(), plain.model.state_dict())
    said = [r.getMessage() for r in caplog.records if "Not rejuvenated" in r.getMessage()]
    assert len(said) == 3
    with pytest.raises(ValueError, match="do not hold the same parameters"):
        fit(
            Line(),
            RejuvenationCallback({"w": torch.ones(1)}, at_epoch=2, alpha=0.5),
            tmp_path=tmp_path,
            fast_dev_run=1,
        )
    with pytest.raises(RuntimeError, match="'levle'"):
        fit(Line(), rejuvenation(when=WhenMetric("levle", 1.0)), tmp_path=tmp_path, fast_dev_run=1)


def test_without_a_fit_nothing_happens_and_a_later_fit_works(tmp_path):
    """Evaluation runs in inference mode, where tensors could be made that a later fit cannot edit."""

    class Evaluated(Line):
        test_step = Line.validation_step
        test_dataloader = predict_dataloader = Line.val_dataloader

        def predict_step(self, batch, batch_idx):
            return self.model(torch.zeros(1, 3))

    module, callback = Evaluated(), rejuvenation(at_start=True)
    before = copy.deepcopy(module.model.state_dict())
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=[callback],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    trainer.predict(module)
    assert equal(module.model.state_dict(), before)
    assert callback.report is None
    trainer.fit(module)
    trainer.validate(module, verbose=False)
    assert callback.rejuvenated_at == [0]


def test_no_training_batches(tmp_path):
    callback, module = rejuvenation(at_start=True), Line()
    fit(module, callback, tmp_path=tmp_path, limit_train_batches=0)
    assert callback.rejuvenated_at == []
    assert equal(module.model.state_dict(), Line().model.state_dict())


def test_overfit_batches(tmp_path):
    callback = rejuvenation(when=Every(epochs=1))
    fit(Line(), callback, tmp_path=tmp_path, overfit_batches=2)
    assert callback.rejuvenated_at == [2, 4]


def test_the_sanity_check_is_no_look(tmp_path):
    callback = rejuvenation(when=WhenMetric("level", 2.0, patience=2))
    fit(Line(), callback, tmp_path=tmp_path, num_sanity_val_steps=1)
    assert callback.rejuvenated_at == [8]


def test_a_validation_outside_a_fit_is_no_look(tmp_path):
    callback, module = rejuvenation(when=WhenMetric("level", 0.75, patience=3)), Line()
    trainer = fit(module, callback, tmp_path=tmp_path, max_epochs=4)
    assert callback.state_dict()["trigger"]["crossed"] == 2
    trainer.validate(module, verbose=False)
    assert callback.state_dict()["trigger"]["crossed"] == 2


class Gradients(Callback):
    """Whether the first parameter had a gradient when the edit was made."""

    seen: tuple[int, bool] | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, RejuvenationCallback))
        if callback.rejuvenated_at and self.seen is None:
            present = next(pl_module.parameters()).grad is not None
            self.seen = (trainer.fit_loop.total_batch_idx, present)


@pytest.mark.parametrize(("every", "batch"), [(1, 4), (2, 4), (3, 6)])
def test_manual_optimization_waits_for_a_batch_in_which_an_optimizer_stepped(every, batch, tmp_path):
    """Two optimizers that step every so many batches, also across the end of an epoch; due at batch 4."""
    callback, gradients = rejuvenation(at_epoch=1), Gradients()
    trainer = fit(Line(manual=every), callback, gradients, tmp_path=tmp_path)
    assert gradients.seen == (batch, False)
    assert callback.rejuvenated_at == [2 * (batch // every)]
    assert trainer.global_step == 2 * (12 // every)


def test_it_waits_for_the_end_of_an_accumulation(tmp_path):
    """A run that resumes in the middle of an epoch may be in the middle of an accumulation as well."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    class Moment(Callback):
        batches: tuple[int, ...] = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if callback.rejuvenated_at:
                self.batches = (*self.batches, batch_idx)

    fit(Line(), Saves(), tmp_path=tmp_path, accumulate_grad_batches=3, max_epochs=1)
    callback, moment = rejuvenation(at_start=True), Moment()
    options = {"accumulate_grad_batches": 3, "max_epochs": 1}
    fit(Line(), callback, moment, tmp_path=tmp_path, ckpt_path=tmp_path / "middle.ckpt", **options)
    assert moment.batches[0] == 3  # not 2, where the run was resumed


def _edited_language_model(change, tmp_path, anchor="base", **options):
    """A model that is changed before it is trained, before the edit and after it; the base."""
    base = tiny_llama()
    module = Calibrated(sharpened(base), base)
    changed = change(module)
    trained = module if changed is None else changed
    before, after = Snapshots(), Snapshots()
    settings = {"when": AtStep(2), "alpha": 0.4, "reset": Reset(fraction=0.1), **options}
    callback = RejuvenationCallback(base if anchor == "base" else anchor, **settings)
    fit(trained, before, callback, after, tmp_path=tmp_path, max_epochs=1)
    assert callback.rejuvenated_at == [2]
    return before.taken[2], after.taken[2], base, module


def _plain(module):
    pass


def _compiled_inside(module):
    module.model = torch.compile(module.model, backend="eager")


def _compiled_in_place(module):
    """And run before, as a validation does: there are graphs for evaluation then, without hooks."""
    module.model.compile(backend="eager")
    inputs = {"input_ids": module._data[0]["input_ids"]}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            module.model(**inputs)


def _compiled_whole(module):
    return torch.compile(module, backend="eager")


def _checkpointed(module):
    module.model.gradient_checkpointing_enable()
    module.model.train()


CHANGES = [_plain, _compiled_inside, _compiled_in_place, _compiled_whole, _checkpointed]


@pytest.mark.parametrize("change", CHANGES)
def test_compiled_and_checkpointed_models(change, tmp_path):
    """Hooks that are added after the first compiled call do not fire in the graph; the reset needs them."""
    before, after, base, module = _edited_language_model(change, tmp_path)
    expected = tiny_llama()
    expected.load_state_dict({canonical_name(k): v for k, v in before.items()})
    rejuvenate(expected, base, module._data[:2], alpha=0.4, reset=Reset(fraction=0.1))
    assert equal(expected.state_dict(), {canonical_name(k): v for k, v in after.items()})


def test_layers_in_checkpoint_wrappers_are_fused_and_their_reset_is_refused_at_the_start(tmp_path):
    """Lightning's own way of activation checkpointing under FSDP, which shards; here on a whole model."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    def wrap(module):
        module.model.config.use_cache = (
            False  # transformers 5.0 keeps keys and values of the first pass otherwise
        )
        layer = type(module.model.model.layers[0])
        apply_activation_checkpointing(module.model, check_fn=lambda m: isinstance(m, layer))

    before, after, base, _ = _edited_language_model(wrap, tmp_path, reset=None)
    anchor = {name: base.state_dict()[canonical_name(name)] for name in before}
    assert equal(fused(before, anchor, 0.4), after)
    with pytest.raises(ValueError, match="neuron map .* does not fit"):
        _edited_language_model(wrap, tmp_path)


def test_lora_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)

    def adapt(module):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module.model = peft.get_peft_model(module.model, config)

    before, after, _, module = _edited_language_model(adapt, tmp_path, anchor=None)
    expected = module.model
    expected.load_state_dict(before)
    rejuvenate(expected, None, module._data[:2], alpha=0.4, reset=Reset(fraction=0.1))
    assert equal(expected.state_dict(), after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_edits_what_a_trainer_trains_and_nothing_else(tmp_path):
    """Beside the model the module holds others, as a reward model; frozen parameters of the model are edited too."""

    class Two(Line):
        def __init__(self):
            super().__init__()
            self.model[0].weight.requires_grad_(False)

    module, snapshots = Two(), Snapshots()
    start = copy.deepcopy(module.model.state_dict())
    fit(module, rejuvenation(at_start=True), snapshots, tmp_path=tmp_path, max_epochs=1)
    assert equal(snapshots.taken[0], fused(start, line_anchor(), 0.3))
