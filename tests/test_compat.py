"""Canaries: each fails when a private name of another package changes its meaning."""

from __future__ import annotations

import contextlib
import copy
import sys

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torchmetrics import SumMetric

from lightning_rejuv._compat import (
    adapters_are_disabled,
    average_of,
    callbacks_of,
    computes_fast_in_bfloat16,
    fast_dev_run,
    first_logged_step,
    is_run_as_it_is,
    language_model,
    log_interval,
    logged_step,
    mark_updated,
    reshard,
    version_of,
)
from lightning_rejuv.metrics import PlasticityMonitor
from tests.conftest import batch, tiny_llama
from tests.processes import run_in_processes


def test_steps_are_those_of_lightnings_own_logging():
    class Steps(Callback):
        def __init__(self):
            self.seen, self.first = [], None

        def on_train_start(self, trainer, pl_module):
            self.first = first_logged_step(trainer)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((logged_step(trainer), trainer.global_step))

    steps = Steps()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=0,
        accumulate_grad_batches=2,
        log_every_n_steps=7,
        logger=False,
        callbacks=[steps],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    assert steps.first == 0
    assert steps.seen == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert logged_step(trainer) == 2
    assert log_interval(trainer) == 7
    assert steps in callbacks_of(trainer)


def test_a_module_with_a_hook_or_another_forward_is_not_run_as_it_is():
    module = nn.Linear(2, 2)
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert is_run_as_it_is(module)  # what comes before it, it does not know
    handle.remove()
    handle = module.register_forward_hook(lambda *_: None)
    assert not is_run_as_it_is(module)
    handle.remove()
    assert is_run_as_it_is(module)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)  # on every module there is
    assert not is_run_as_it_is(module)
    handle.remove()
    module.forward = module.forward
    assert not is_run_as_it_is(module)


def test_a_change_in_place_is_another_version_of_a_tensor_and_its_views():
    tensor = torch.zeros(2, 3)
    view, first = tensor[:, :2], version_of(tensor)
    with torch.no_grad():
        tensor.add_(1)
    second = version_of(view)
    assert second > first
    view.mul_(2)
    assert version_of(tensor) > second
    assert version_of(tensor + 1) == 0


def test_language_model_is_the_only_outermost_one(monkeypatch):
    llama = tiny_llama()
    holder = nn.Module()
    holder.inner = nn.Sequential(llama)
    assert language_model(holder) is llama
    assert language_model(llama) is llama
    holder.reference = copy.deepcopy(llama)
    assert language_model(holder) is holder  # two: which one, nobody can say
    holder.language_model = holder.reference
    assert language_model(holder) is holder.reference  # but the module
    holder.reference.requires_grad_(False)
    assert language_model(holder) is llama  # the one that is trained
    other = nn.Sequential(nn.Linear(2, 2))
    assert language_model(other) is other
    other.language_model = other[0]
    assert language_model(other) is other[0]
    monkeypatch.delitem(sys.modules, "transformers")
    assert language_model(llama) is llama
    assert "transformers" not in sys.modules


def test_adapters_are_switched_off_by_a_flag_that_peft_looks_at():
    peft = pytest.importorskip("peft")
    base, ids = tiny_llama(), batch()["input_ids"]
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.zero_()
        expected, trained = base(input_ids=ids).logits, model(input_ids=ids).logits
        with adapters_are_disabled(m for m in model.modules() if hasattr(m, "_disable_adapters")):
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, trained)
    assert not torch.equal(expected, trained)
    assert model.get_output_embeddings().modules_to_save["default"].weight.requires_grad


def test_a_marked_metric_forgets_its_cached_value():
    metric = SumMetric()
    metric.update(1.0)
    assert metric.compute() == 1.0
    metric.sum_value = torch.tensor(5.0)
    assert metric.compute() == 1.0  # cached
    mark_updated(metric)
    assert metric.compute() == 5.0
    fresh = SumMetric()
    mark_updated(fresh)
    assert fresh.update_called


def test_fast_dev_run_is_known_to_the_trainer():
    for batches, expected in ((False, False), (True, True), (3, True)):
        assert fast_dev_run(Trainer(accelerator="cpu", logger=False, fast_dev_run=batches)) is expected


def test_callbacks_that_average_weights():
    callback, module = EMAWeightAveraging(), BoringModel()
    assert average_of(callback) is None
    callback.setup(Trainer(logger=False), module, "fit")
    assert isinstance(average_of(callback).module, BoringModel)
    assert average_of(callback).module is not module


def test_measuring_under_fsdp2_leaves_no_full_parameters_behind(tmp_path):
    probe = [batch(seed=5)]
    expected = PlasticityMonitor(probe=probe).measure(tiny_llama())

    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = init_device_mesh("cpu", (2,))
        model = tiny_llama()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with torch.no_grad():
            model(**probe[0])
        stale = not isinstance(model.lm_head.weight, DTensor)  # the trap is real
        reshard(model)
        values = PlasticityMonitor(probe=probe).measure(model)
        sharded = all(isinstance(p, DTensor) for p in model.parameters())
        return stale, sharded, {name: value.item() for name, value in values.items()}

    for stale, sharded, values in run_in_processes(work, tmp_path):
        assert stale
        assert sharded
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name].item(), rtol=1e-4, atol=1e-6)


def test_fabrics_wrapper_is_taken_off_and_saved_buffers_are_known():
    from lightning.fabric import Fabric

    from lightning_rejuv._compat import persistent_buffers, unwrap

    net = nn.Sequential(nn.BatchNorm1d(2))
    net.register_buffer("constant", torch.ones(1), persistent=False)
    assert unwrap(Fabric(accelerator="cpu", devices=1).setup(net)) == (net, net, False)
    assert unwrap(nn.DataParallel(net))[1] is net
    assert unwrap(net) == (net, net, False)
    saved = {name for name in net.state_dict() if name not in dict(net.named_parameters())}
    assert {name for name, _ in persistent_buffers(net)} == saved


@pytest.mark.parametrize(
    ("known", "fast"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "aarch64", "neon": True}, False),
    ],
)
def test_a_cpu_with_bfloat16_instructions_computes_fast_in_it(known, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert computes_fast_in_bfloat16(torch.device("cpu")) is fast
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not computes_fast_in_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(("avx512", "amx"), [(True, False), (False, True), (False, False)])
def test_an_older_torch_says_so_privately(avx512, amx, monkeypatch):
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert computes_fast_in_bfloat16(torch.device("cpu")) is (avx512 or amx)


def test_this_cpus_two_answers_agree():
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("torch has no get_capabilities before 2.11")
    known = torch.cpu.get_capabilities()
    if known["architecture"] == "x86_64":
        assert known["avx512_bf16"] is torch.cpu._is_avx512_bf16_supported()
        assert known["amx_tile"] is torch.cpu._is_amx_tile_supported()


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_is_not_fast_in_it(native, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert computes_fast_in_bfloat16(torch.device("cuda", 1)) is native
    assert asked == [torch.device("cuda", 1)]


def test_other_devices_compute_in_float32():
    assert not computes_fast_in_bfloat16(torch.device("mps"))
