"""What a monitor in a fit is anchored to: the weights that the fit starts with, or the base under adapters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rejuv import PlasticityCallback, PlasticityMonitor
from lightning_rejuv.functional import relative_drift
from tests.callbacks.modules import Line, Module, Snapshots, fit
from tests.callbacks.strategies import STRATEGIES, Sharded
from tests.callbacks.test_distributed import in_two_ranks
from tests.callbacks.test_sharded_strategies import fit as fit_sharded
from tests.conftest import batch, greedy_batch, shifted, tiny_llama
from tests.metrics.test_monitor import clone_of

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


class Values(Callback):
    """What was logged at the start and after each step; listed after the callback under test."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer)

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({n[11:]: float(v) for n, v in trainer.callback_metrics.items() if "plasticity" in n})


def drift_between(state, start):
    return float(relative_drift(*(torch.cat([w.flatten() for w in s.values()]) for s in (state, start))))


def test_init_is_the_weights_that_the_fit_starts_with(tmp_path):
    module, values, weights = Line(), Values(), Snapshots()
    start = copy.deepcopy(module.model.state_dict())
    monitor = PlasticityMonitor("init", sites=None, rank_sites=None)
    fit(module, PlasticityCallback(monitor, every_n_steps=1), values, weights, tmp_path=tmp_path)
    assert values.seen[0]["relative_drift"] == 0
    assert values.seen[0]["drift_sparsity"] == 1
    for seen, taken in zip(values.seen, weights.taken, strict=False):
        assert seen["relative_drift"] == pytest.approx(drift_between(taken, start), rel=1e-5)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # a copy in memory, no file
    assert len(pickle.dumps(monitor.base)) < 200
    assert monitor.state_dict() == {}
    # After the fit it is what it was; another fit, of another module, has a start of its own.
    assert monitor.measure(module.model)["relative_drift"].item() == pytest.approx(
        drift_between(module.model.state_dict(), start), rel=1e-5
    )
    values = Values()
    fit(module, PlasticityCallback(monitor, every_n_steps=1), values, tmp_path=tmp_path)
    assert values.seen[0]["relative_drift"] == 0
    assert values.seen[-1]["relative_drift"] > 0


def test_init_with_a_probe(tmp_path):
    base = tiny_llama()
    start = clone_of(base)
    module = Module(base, copy.deepcopy(base))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    monitor = PlasticityMonitor("init", probe=[batch()], base_samples=[greedy_batch(base)])
    fit(module, PlasticityCallback(monitor, every_n_steps=2), tmp_path=tmp_path, max_epochs=1)
    expected = PlasticityMonitor(start, probe=[batch()], base_samples=[greedy_batch(tiny_llama())])
    found, wanted = monitor.measure(module), expected.measure(module)
    assert wanted["entropy_gap"].item() > 1e-4
    assert {n: v.item() for n, v in found.items()} == pytest.approx({n: v.item() for n, v in wanted.items()})
    assert monitor.reference.values == pytest.approx(expected.reference.values)


def test_the_first_weights_of_a_resumed_run_are_kept_or_asked_for(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    monitor = PlasticityMonitor("init", sites=None, rank_sites=None)
    module = Line()
    start = copy.deepcopy(module.model.state_dict())
    fit(module, PlasticityCallback(monitor, every_n_steps=1), checkpoint, tmp_path=tmp_path, max_epochs=1)
    values = Values()
    last = tmp_path / "last.ckpt"
    fit(module, PlasticityCallback(monitor, every_n_steps=1), values, tmp_path=tmp_path, ckpt_path=last)
    assert values.seen[-1]["relative_drift"] == pytest.approx(
        drift_between(module.model.state_dict(), start), rel=1e-5
    )
    other = PlasticityCallback(PlasticityMonitor("init", sites=None, rank_sites=None))
    with pytest.raises(
        ValueError, match=r'start of a run for `anchor="init"` but the fit resumes one.*Pass their path'
    ):
        fit(Line(), other, tmp_path=tmp_path, ckpt_path=last)


def test_init_outside_of_a_fit_says_so():
    monitor = PlasticityMonitor("init", probe=[batch()])
    for call in (monitor.measure, monitor.measure_drift):
        with pytest.raises(
            ValueError, match=r'a fit with a PlasticityCallback for `anchor="init"`.*a deep copy'
        ):
            call(tiny_llama())


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)  # of A
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    module = Module(model, tiny_llama())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    return module


def test_init_and_adapters_are_refused_at_the_start(tmp_path):
    callback = PlasticityCallback(PlasticityMonitor("init", probe=[batch()]))
    with pytest.raises(ValueError, match=r"its base lies under them. Pass `anchor=None`"):
        fit(adapted(), callback, tmp_path=tmp_path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_model_with_adapters_is_measured_against_the_base_under_them(tmp_path, precision):
    tiny_llama().save_pretrained(tmp_path / "base")
    found = []
    for anchor in (None, tmp_path / "base"):
        values, module = Values(), adapted()
        monitor = PlasticityMonitor(anchor, probe=[batch()], base_samples=[greedy_batch(tiny_llama())])
        fit(
            module,
            PlasticityCallback(monitor, every_n_steps=2),
            values,
            tmp_path=tmp_path,
            max_epochs=1,
            precision=precision,
        )
        assert values.seen[0]["relative_drift"] == pytest.approx(0.0, abs=0 if anchor is None else 2e-3)
        assert values.seen[-1]["relative_drift"] > 0
        assert {"entropy_gap", "support_retention", "drift_sparsity"} <= values.seen[-1].keys()
        assert all(p.requires_grad == ("lora" in n) for n, p in module.model.named_parameters())
        found.append(values.seen[-1])
    if precision == "32-true":
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_init_under_strategies(tmp_path, strategy):
    base = tiny_llama()

    def run(**options):
        values = Values()
        monitor = PlasticityMonitor("init", sites=None, rank_sites=None)
        module = Sharded(shifted(base), base)
        fit_sharded(module, tmp_path, PlasticityCallback(monitor, every_n_steps=1), values, **options)
        return [seen["relative_drift"] for seen in values.seen]

    expected = run()
    assert expected[0] == 0 < expected[-1]
    for found, error in in_two_ranks(lambda: run(strategy=STRATEGIES[strategy](), devices=2)).values():
        assert error is None, error
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
