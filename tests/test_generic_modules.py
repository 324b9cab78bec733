"""The same call on modules that are no language models: an MLP and a CNN with a loss closure."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.attribution import attribute_loss
from lightning_rejuv.neurons import output_rows
from tests.conftest import shifted


class Classifier(LightningModule):
    """A small CNN, as a LightningModule."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 5, 3, bias=False)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(5 * 4 * 4, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, images):
        return self.head(self.features(images))


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, *shape, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(count)
    ]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (Classifier, (1, 8, 8))], ids=["mlp", "cnn"])
def test_the_score_is_gradient_times_activation(make, shape):
    torch.manual_seed(0)
    model, data = make().double().eval(), [(x.double(), y) for x, y in batches(shape)]
    groups = output_rows(model)
    result = attribute_loss(model, groups, data, loss)
    signed = [torch.zeros_like(t) for t in result.total]
    absolute = [torch.zeros_like(t) for t in result.total]
    for batch in data:
        outputs = {}
        handles = [
            model.get_submodule(g.module).register_forward_hook(
                lambda _m, _a, out, name=g.module, kept=outputs: kept.__setitem__(name, out)
            )
            for g in groups
        ]
        value = loss(model, batch)
        gradients = torch.autograd.grad(value, list(outputs.values()))
        for handle in handles:
            handle.remove()
        for number, (out, gradient) in enumerate(zip(outputs.values(), gradients, strict=True)):
            score = (out * gradient).transpose(0, 1).flatten(1).sum(1).detach()
            signed[number] += score
            absolute[number] += score.abs()
    for got, want in ((result.total, signed), (result.absolute, absolute)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (Classifier, (1, 8, 8))], ids=["mlp", "cnn"])
def test_rows_and_their_biases_return_to_the_base(make, shape):
    torch.manual_seed(0)
    base = make()
    sft = shifted(base)
    before = {n: p.detach().clone() for n, p in sft.named_parameters()}
    buffers = {n: b.clone() for n, b in sft.named_buffers()}
    report = rejuvenate(sft, base, batches(shape), alpha=1.0, reset=Reset(fraction=0.25), loss=loss)
    assert report.neurons_reset == round(0.25 * report.neurons_total)
    assert report.comparison is None
    rows = 0
    for group in output_rows(sft):
        now, was, there = (
            sft.get_parameter(group.parameter),
            before[group.parameter],
            base.get_parameter(group.parameter),
        )
        moved = (now != was).flatten(1).any(1)
        rows += int(moved.sum())
        assert torch.equal(now[moved], there[moved])
        if group.bias:
            assert torch.equal(sft.get_parameter(group.bias)[moved], base.get_parameter(group.bias)[moved])
            assert torch.equal(sft.get_parameter(group.bias)[~moved], before[group.bias][~moved])
    assert rows == report.neurons_reset
    assert all(torch.equal(b, buffers[n]) for n, b in sft.named_buffers())  # statistics of norms are left
    assert "ranked absolute by loss" in str(report)


def _adapted(targets, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    config = peft.LoraConfig(r=2, target_modules=targets, lora_bias=True, **options)
    model = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return base, model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["4"]}], ids=["", "modules to save"])
def test_with_adapters_the_rows_that_they_change_are_reset(options):
    """Against the same on the merged weights; the layers without an adapter are the base's own."""
    base, model = _adapted(["0", "2"], **options)
    data = [(x.double(), y) for x, y in batches((4,))]
    was = copy.deepcopy(model).merge_and_unload()
    report = rejuvenate(model, None, data, alpha=1.0, reset=Reset(fraction=0.4), loss=loss)
    assert report.neurons_total == 8 + 8 + 3
    assert report.neurons_reset == 8
    now = model.merge_and_unload()
    rows = 0
    for layer in (0, 2, 4):
        moved = (now[layer].weight - was[layer].weight).abs().amax(1) > 1e-12
        rows += int(moved.sum())
        for name in ("weight", "bias"):
            end, start, there = (getattr(m[layer], name) for m in (now, was, base))
            torch.testing.assert_close(
                end, torch.where(moved[:, None] if end.dim() > 1 else moved, there, start)
            )
    assert rows == 8


def test_the_score_of_an_adapter_is_the_derivative_by_what_it_adds():
    _, model = _adapted(["0", "2"])
    data = [(x.double(), y) for x, y in batches((4,))]
    edited = {name for name, p in model.named_parameters() if "lora_B" in name}
    groups = output_rows(model, edited)
    result = attribute_loss(model, groups, data, loss)
    assert [group.fixed for group in groups] == [False, False, True]
    assert not bool(result.absolute[2].any())
    for group, total in zip(groups[:2], result.total, strict=False):
        for neuron in (0, 5):
            values = []
            for step in (1e-5, -1e-5):
                other = copy.deepcopy(model)
                with torch.no_grad():
                    for name in (group.parameter, group.bias):
                        other.get_parameter(name)[neuron] *= 1 + step
                    values.append(sum(loss(other, batch) for batch in data))
            assert float(total[neuron]) == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no `loss` without a `reset` and a number for `alpha`"),
        (
            {"reset": Reset(fraction=0.1)},
            "Expected a number for `alpha` with `loss` but got 'auto', a rule that goes by the responses",
        ),
        (
            {"alpha": 1.0, "reset": Reset(fraction=0.1, budget="union", quantity="target_logit")},
            "Expected no `quantity`, `budget` with `loss`",
        ),
        (
            {"alpha": 1.0, "reset": Reset(fraction=0.1, positions="entropy_gap")},
            "Expected no `positions` with `loss`",
        ),
        (
            {"alpha": 1.0, "reset": Reset(fraction=0.1, positions_per_response=2)},
            "Expected no `positions_per_response` with `loss`",
        ),
    ],
)
def test_what_does_not_go_with_a_loss_is_refused_before_data_are_read(options, message):
    """The paper's union has no positions here: it would reset nothing, without a word."""

    def unread():
        raise AssertionError("the data are read")
        yield

    base = mlp()
    with pytest.raises(ValueError, match=message):
        rejuvenate(shifted(base), base, unread(), loss=loss, **options)


def test_bad_losses_and_modules():
    base = mlp()
    sft = shifted(base)
    before = copy.deepcopy(sft.state_dict())
    with pytest.raises(ValueError, match="one number with a gradient but got"):
        rejuvenate(sft, base, batches((4,)), loss=lambda m, b: m(b[0]), alpha=0.5, reset=Reset(fraction=0.1))
    with pytest.raises(ValueError, match="one number with a gradient but got 1.0"):
        rejuvenate(sft, base, batches((4,)), loss=lambda m, b: 1.0, alpha=0.5, reset=Reset(fraction=0.1))
    with pytest.raises(ValueError, match="iterable is empty"):
        rejuvenate(sft, base, [], loss=loss, alpha=0.5, reset=Reset(fraction=0.1))
    with pytest.raises(ValueError, match="`calibration` batches for `loss`"):
        rejuvenate(sft, base, loss=loss, alpha=0.5, reset=Reset(fraction=0.1))
    norm = nn.LayerNorm(3)
    with pytest.raises(ValueError, match="have linear or convolutional layers"):
        rejuvenate(shifted(norm), norm, batches((3,)), loss=loss, alpha=0.5, reset=Reset(fraction=0.1))
    assert all(torch.equal(v, before[k]) for k, v in sft.state_dict().items())


def test_a_loss_that_leaves_the_module_in_training_spoils_nothing():
    """Neither the scores of the batches after it nor what the caller finds afterwards: dropout would show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    groups = output_rows(model)

    def restless(model, batch):
        value = loss(model, batch)
        model.train()
        model[2].weight.requires_grad_(False)
        torch.set_grad_enabled(False)
        return value

    expected, found = (attribute_loss(model, groups, batches((4,)), one) for one in (loss, restless))
    for a, b in zip(found.total, expected.total, strict=True):
        assert torch.equal(a, b)
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(p.requires_grad for p in model.parameters())
