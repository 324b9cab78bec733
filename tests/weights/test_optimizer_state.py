from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import Reset, rejuvenate
from tests.conftest import greedy_batch, sharpened, tiny_llama

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


def _trained(model, make, steps=5):
    optimizer = make(model.parameters())
    data = greedy_batch(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    return optimizer


def _momenta(optimizer, model):
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        found[name] = state.get("exp_avg", state.get("momentum_buffer"))
    return {name: None if m is None else m.clone() for name, m in found.items()}


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_momentum_of_what_was_edited_is_forgotten_row_by_row(pair, make):
    base, sft = pair
    optimizer = _trained(sft, make)
    before, weights = _momenta(optimizer, sft), {n: p.detach().clone() for n, p in sft.named_parameters()}
    data = [greedy_batch(base)]
    report = rejuvenate(sft, base, data, alpha=1.0, reset=Reset(fraction=0.1), optimizer=optimizer)
    after = _momenta(optimizer, sft)
    zeroed = 0
    for name, parameter in sft.named_parameters():
        edited = parameter != weights[name]
        assert not after[name][edited].any()
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept])
        zeroed += int(edited.any())
        if not edited.any():
            assert torch.equal(after[name], before[name])
    assert zeroed > 0
    assert report.optimizer_state_left == []


def test_fusion_forgets_all_momentum_and_keep_keeps_it(pair):
    base, sft = pair
    optimizer = _trained(sft, OPTIMIZERS["adamw"])
    before = _momenta(optimizer, sft)
    rejuvenate(sft, base, alpha=0.9, optimizer=optimizer, optimizer_state="keep")
    assert all(torch.equal(m, before[n]) for n, m in _momenta(optimizer, sft).items())
    rejuvenate(sft, base, alpha=0.9, optimizer=[optimizer])
    assert not any(m.any() for m in _momenta(optimizer, sft).values())
    steps = {float(s["step"]) for s in optimizer.state.values()}
    assert steps == {5.0}


def test_reset_drops_the_state_of_edited_parameters_only(pair):
    base, sft = pair
    with torch.no_grad():
        sft.lm_head.weight.copy_(base.lm_head.weight)
        sft.model.layers[0].mlp.up_proj.weight.add_(0.01)
    optimizer = _trained(sft, OPTIMIZERS["adamw"])
    alpha = {"lm_head.*": 1.0, "*": 0.5}
    rejuvenate(sft, base, alpha=alpha, optimizer=optimizer, optimizer_state="reset")
    left = [name for name, p in sft.named_parameters() if p in optimizer.state]
    assert left == ["lm_head.weight"]
    sft(**greedy_batch(base)).loss.backward()
    optimizer.step()  # the state is made anew


def _first_step(mode):
    """Largest first step, in learning rates, of an element whose momentum was forgotten."""
    torch.manual_seed(0)
    layer, base = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(2000):
        layer.weight.grad = 1 + 0.1 * torch.randn(4, 4)
        optimizer.step()
    rejuvenate(layer, base, alpha=0.5, optimizer=optimizer, optimizer_state=mode)
    start = layer.weight.detach().clone()
    layer.weight.grad = torch.ones(4, 4)
    optimizer.step()
    return float((layer.weight - start).abs().max()) / 1e-3


def test_the_first_step_after_the_edit_is_no_kick():
    assert _first_step("momentum") < 0.2
    assert _first_step("keep") == pytest.approx(1.0, abs=0.15)
    assert _first_step("reset") == pytest.approx(1.0, abs=0.01)


def test_a_state_that_cannot_be_sliced_is_reported(pair):
    base, sft = pair
    optimizer = _trained(sft, lambda p: torch.optim.Adafactor(p, lr=1e-3))
    report = rejuvenate(sft, base, alpha=0.5, optimizer=optimizer)
    matrices = [name for name, p in sft.named_parameters() if p.dim() > 1]
    assert set(matrices) <= set(report.optimizer_state_left)
    assert "could not be edited" in str(report)


def test_the_option_of_the_callback_reaches_the_trainers_optimizers(pair, tmp_path):
    from lightning.pytorch import Callback

    from lightning_rejuv import RejuvenationCallback
    from tests.callbacks.modules import Calibrated, fit

    base, sft = pair
    seen = {}
    for mode in ("momentum", "reset", "keep"):

        class Look(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, mode=mode):
                if trainer.global_step == 4:
                    [optimizer] = trainer.optimizers
                    buffers = [s.get("momentum_buffer") for s in optimizer.state.values()]
                    seen[mode] = None if not buffers else sum(float(b.abs().sum()) for b in buffers)

        module = Calibrated(copy.deepcopy(sft), base)
        module.configure_optimizers = lambda module=module: torch.optim.SGD(
            module.parameters(), lr=1e-4, momentum=0.9
        )
        callback = RejuvenationCallback(base, at_epoch=1, optimizer_state=mode, alpha=0.5)
        fit(module, callback, Look(), tmp_path=tmp_path, max_epochs=2)
    assert seen["momentum"] == 0.0
    assert seen["reset"] is None
    assert seen["keep"] > 0


def test_a_quantised_state_of_the_parameters_shape_is_reported():
    """As 8-bit optimizers keep it: a byte for each weight, which means nothing without its block's scale."""
    layer, base = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    codes = torch.full((2, 3), 7, dtype=torch.uint8)
    optimizer.state[layer.weight] = {"step": 3, "state1": codes, "absmax1": torch.ones(2, 3)}
    optimizer.state[layer.bias] = {"exp_avg": torch.ones(2)}
    report = rejuvenate(layer, base, alpha=0.5, optimizer=optimizer)
    assert report.optimizer_state_left == ["weight"]
    assert bool((codes == 7).all())
    assert not optimizer.state[layer.bias]["exp_avg"].any()
