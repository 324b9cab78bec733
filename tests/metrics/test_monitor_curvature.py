"""The curvature that the monitor measures: against the whole Hessian, and the model does not notice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv.functional import response_mask
from lightning_rejuv.metrics import PlasticityMonitor
from tests.conftest import batch, shifted, tiny_llama
from tests.processes import run_in_processes

PROBE = [batch(seed=0), batch(rows=2, length=12, seed=1)]


@pytest.fixture
def wide():
    """A float64 model of which only the gains of the last norm are trained, so that their Hessian is small."""
    model = shifted(tiny_llama(), 0.1).double()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    return model


def loss_of(model: nn.Module, one: dict[str, torch.Tensor], gains: torch.Tensor) -> torch.Tensor:
    """The loss by the plain route: from the hidden states before the last norm, of which nothing else depends."""
    seen = []
    hook = model.model.norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=one["input_ids"], attention_mask=one["attention_mask"])
    hook.remove()
    hidden = seen[0] * (seen[0].square().mean(-1, keepdim=True) + model.model.norm.variance_epsilon).rsqrt()
    logits = (gains * hidden) @ model.lm_head.weight.T
    targets = one["labels"][:, 1:][one["labels"][:, 1:] != -100]
    return nn.functional.cross_entropy(logits[response_mask(one["labels"])], targets)


def test_it_is_the_mean_over_batches_of_the_hessians_largest_eigenvalue(wide):
    gains = wide.model.norm.weight.detach().clone()
    values = PlasticityMonitor(probe=PROBE, curvature=True).measure(wide)
    largest, gaps = [], []
    for one in PROBE:
        hessian = torch.autograd.functional.hessian(lambda g, one=one: loss_of(wide, one, g), gains)
        largest.append(torch.linalg.eigvalsh(hessian)[-1])
        gradient = torch.autograd.functional.jacobian(lambda g, one=one: loss_of(wide, one, g), gains)
        up = gains + 0.05 * gradient / gradient.norm()
        gaps.append(loss_of(wide, one, up) - loss_of(wide, one, gains))
    assert values["sharpness"].item() == pytest.approx(torch.stack(largest).mean().item(), rel=1e-5)
    assert values["sam_gap"].item() == pytest.approx(torch.stack(gaps).mean().item(), rel=1e-5)


def test_the_model_does_not_notice(tuned):
    model = copy.deepcopy(tuned).train()
    model.model.layers[0].mlp.eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    monitor = PlasticityMonitor(probe=PROBE, curvature=True)
    with torch.inference_mode():
        inside = monitor.measure(model)
    assert torch.equal(torch.rand(1), drawn)
    assert inside["sharpness"] > 0
    assert inside["sam_gap"] > 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"lm_head.weight"}


def test_it_is_not_measured_unasked_nor_of_the_base(tuned, llama):
    assert "sharpness" not in PlasticityMonitor(probe=PROBE).measure(tuned)
    monitor = PlasticityMonitor(anchor=llama.state_dict(), probe=PROBE, curvature=True)
    values = monitor.measure(tuned)
    assert {"sharpness", "sam_gap", "relative_drift"} <= set(values)
    assert "sharpness" not in monitor.reference.values
    again = monitor.measure(tuned)  # in place of the measurement before
    assert again["sharpness"].item() == pytest.approx(values["sharpness"].item(), rel=1e-6)


def test_a_model_that_trains_nothing_has_no_curvature(tuned):
    frozen = copy.deepcopy(tuned).requires_grad_(False)
    with pytest.warns(
        UserWarning, match="curvature is left out.*no parameter of the model requires a gradient"
    ):
        values = PlasticityMonitor(probe=PROBE, curvature=True).measure(frozen)
    assert "token_nll" in values
    assert not {"sharpness", "sam_gap"} & set(values)


def test_sharded_parameters_have_no_curvature(llama, tmp_path):
    def work(rank):
        from torch.distributed.fsdp import fully_shard

        model = copy.deepcopy(llama)
        fully_shard(model)
        with pytest.warns(UserWarning, match="curvature is left out.*its parameters are sharded"):
            return sorted(PlasticityMonitor(probe=PROBE, curvature=True).measure(model))

    first, second = run_in_processes(work, tmp_path)
    assert first == second
    assert "token_nll" in first
    assert not {"sharpness", "sam_gap"} & set(first)


def test_it_needs_a_probe(llama):
    with pytest.raises(ValueError, match="`probe` with `curvature=True` but got None"):
        PlasticityMonitor(anchor=llama.state_dict(), curvature=True)
