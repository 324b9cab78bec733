"""The method and the monitor on a GPU: they agree with the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_rejuv import RejuvenationReport, Reset, rejuvenate
from lightning_rejuv.apply_plan import apply_plan
from lightning_rejuv.callbacks import RejuvenationCallback
from lightning_rejuv.config import Options
from lightning_rejuv.metrics import PlasticityMonitor
from lightning_rejuv.neurons import NeuronGroup
from lightning_rejuv.plan import GroupReset, Plan
from lightning_rejuv.weights import blend as blends
from lightning_rejuv.weights.open_targets import open_targets
from tests.callbacks.modules import Calibrated
from tests.conftest import batch, greedy_batch, sharpened, tiny_llama
from tests.gpu import DEVICE, on_gpu

pytestmark = [on_gpu, pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")]
OPTIONS = {
    "fusion": {"alpha": 0.3},
    "reset": {"alpha": 0.3, "reset": Reset(fraction=0.1)},
    "logit": {"alpha": 0.3, "reset": Reset(fraction=0.1, quantity="target_logit", budget="union")},
    "auto": {"alpha": "auto", "reset": Reset(fraction=0.1)},
}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.float().cpu() for name, value in model.state_dict().items()}


def calibration(base: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [greedy_batch(base, rows=4, seed=seed) for seed in range(2)]


def run_on(device: str, base: nn.Module, **options) -> tuple[RejuvenationReport, dict[str, torch.Tensor]]:
    """Anchor, calibration and samples come from the CPU, as from a file and a data loader."""
    sft, data, samples = sharpened(base).to(device), calibration(base), greedy_batch(base, rows=8, seed=9)
    if options["alpha"] == "auto":
        options["sampler"] = lambda model: [samples]
    report = rejuvenate(sft, dict(base.state_dict()), data if "reset" in options else None, **options)
    return report, weights(sft)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rejuvenation_agrees_with_the_cpu(options):
    base = tiny_llama()
    (report, found), (expected_report, expected) = (run_on(at, base, **options) for at in (DEVICE, "cpu"))
    assert report.alpha == pytest.approx(expected_report.alpha, abs=1e-3)
    assert report.neurons_by_layer == expected_report.neurons_by_layer
    assert report.drift_before == pytest.approx(expected_report.drift_before, rel=1e-4)
    assert report.drift_after == pytest.approx(expected_report.drift_after, rel=1e-3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 if report.search else 1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_fusion_in_bfloat16_rounds_to_one_of_two_neighbours(rounding):
    base = tiny_llama(dtype=torch.bfloat16)
    before, anchor = weights(sharpened(base)), weights(base)
    options = {"alpha": 0.4, "rounding": rounding}
    (report, found), (again, repeated) = (run_on(DEVICE, base, **options) for _ in range(2))
    for name, value in found.items():
        exact = torch.lerp(before[name], anchor[name], 0.6)
        step = exact.abs().clamp_min(1e-30) * torch.finfo(torch.bfloat16).eps
        assert bool(((value - exact).abs() <= step * (0.5001 if rounding == "nearest" else 1.0001)).all())
        assert torch.equal(value, repeated[name])
    assert report.rounding_shift == again.rounding_shift
    assert abs(report.rounding_shift) < 0.01


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA tells who waits for it")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_edit_waits_for_the_device_as_often_as_it_reads_a_result(rounding, dtype):
    """Once, for what rounding did, however many parameters there are; a reset's rows are sent without waiting."""
    base = tiny_llama(dtype=dtype).to(DEVICE)
    sft = sharpened(base)
    targets = open_targets(sft, base)
    group = NeuronGroup("model.layers.0.mlp.up_proj.weight", "", "mlp", 0, dim=0, count=8)
    plan = Plan(0.4, dict.fromkeys(targets.fused, 0.4), [GroupReset(group, torch.tensor([1, 2]))])
    options = Options(alpha=0.4, reset=Reset(fraction=0.1), rounding=rounding)
    apply_plan(targets, plan, options)  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            apply_plan(targets, plan, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) <= 1, [
        str(w.message) for w in waits
    ]


@pytest.mark.skipif(DEVICE != "cuda", reason="only there the copy and the anchor may lie elsewhere")
@pytest.mark.parametrize("room", [True, False])
def test_an_anchor_from_files_is_read_once_where_there_is_room(monkeypatch, room):
    monkeypatch.setattr(blends, "has_room", lambda device, size, part: room)
    base = tiny_llama(dtype=torch.bfloat16)
    sft = sharpened(base).to(DEVICE)
    before, read = weights(sft), []

    def base_of(name):
        read.append(name)
        return base.get_parameter(name).detach()

    fusions = []
    with blends.Blend(dict(sft.named_parameters()), base_of) as blend:
        for alpha in (0.0, 0.5, 0.0, 1.0):
            blend.at(alpha)
            fusions.append(weights(sft))
        assert {kept.device.type for kept in blend._kept.values()} == {DEVICE if room else "cpu"}
    count = len(dict(sft.named_parameters()))
    assert len(read) == (count if room else 3 * count)
    for name, value in weights(sft).items():
        assert torch.equal(value, before[name])
        assert torch.equal(fusions[3][name], before[name])
        assert torch.equal(fusions[0][name], fusions[2][name])
        assert torch.equal(fusions[0][name], weights(base)[name])
        torch.testing.assert_close(
            fusions[1][name], 0.5 * before[name] + 0.5 * weights(base)[name], rtol=1e-2, atol=1e-4
        )


def test_a_reset_forgets_the_momentum_of_the_rows_that_it_resets():
    base = tiny_llama()
    forgotten = {}
    for device in ("cpu", DEVICE):
        sft = sharpened(base).to(device)
        optimizer = torch.optim.AdamW(sft.parameters(), lr=0.0, weight_decay=0.0)
        sft(**{name: value.to(device) for name, value in batch().items()}).loss.backward()
        optimizer.step()
        rejuvenate(sft, base, calibration(base), alpha=1.0, reset=Reset(fraction=0.1), optimizer=optimizer)
        moments = {name: optimizer.state[p]["exp_avg"] for name, p in sft.named_parameters()}
        assert all(moment.device.type == device for moment in moments.values())
        forgotten[device] = {name: moment.eq(0).cpu() for name, moment in moments.items()}
    for name, expected in forgotten["cpu"].items():
        assert torch.equal(forgotten[DEVICE][name], expected), name


def test_the_monitor_agrees_with_the_cpu():
    base, data = tiny_llama(), batch()
    measured, attached = {}, {}
    for device in ("cpu", DEVICE):
        sft = sharpened(base).to(device)
        here = {name: value.to(device) for name, value in data.items()}
        monitor = PlasticityMonitor(anchor=dict(base.state_dict()), probe=[data])
        measured[device] = {name: value.item() for name, value in monitor.measure(sft).items()}
        monitor.reset_model()
        with monitor.attach(sft):
            sft(**here).loss.backward()
        attached[device] = {name: value.item() for name, value in monitor.compute_model().items()}
    for values in (measured, attached):
        assert values[DEVICE].keys() == values["cpu"].keys()
        for name, value in values["cpu"].items():
            assert values[DEVICE][name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


def test_a_fit_rejuvenates_on_its_device(tmp_path):
    from lightning.pytorch import Trainer

    base = tiny_llama()
    module = Calibrated(sharpened(base), base)
    expected = copy.deepcopy(module.model)
    callback = RejuvenationCallback(base, at_start=True, alpha=0.4, reset=Reset(fraction=0.05))
    Trainer(
        max_steps=1,
        accelerator="gpu" if DEVICE == "cuda" else DEVICE,
        devices=1,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module)
    report = rejuvenate(
        expected, base, module.calibration_dataloader(), alpha=0.4, reset=Reset(fraction=0.05)
    )
    assert callback.report is not None
    assert callback.report.neurons_by_layer == report.neurons_by_layer
    assert callback.report.drift_after == pytest.approx(report.drift_after, rel=1e-4)
