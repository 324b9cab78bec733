"""Floating buffers are fused like parameters, alike in Python and on disk; what is no part of the training is left."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_rejuv import rejuvenate
from lightning_rejuv.checkpoints import rejuvenate_checkpoint
from lightning_rejuv.weights.buffers import beside
from tests.conftest import batch, shifted
from tests.families import tiny


class Net(nn.Module):
    """Running statistics, a count, a constant that is not saved and one of a wrapped name."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(24, 3))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("inv_freq", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu()) * self.scale * self.inv_freq


def _pair():
    torch.manual_seed(0)
    base = Net()
    x = torch.randn(16, 2, 8)
    for _ in range(20):
        base(x)
    sft = shifted(base, 0.5)
    with torch.no_grad():
        sft.scale += 1
        sft.inv_freq += 2
    for _ in range(30):
        sft(3 * x)
    return base.eval(), sft.eval(), x


def _as(kind, base, path):
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if kind == "file":
        save_file(state, path / "base.safetensors")
        return path / "base.safetensors"
    if kind == "checkpoint of a LightningModule":
        torch.save(
            {"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}}, path / "base.ckpt"
        )
        return path / "base.ckpt"
    return {"module": base, "state dict": state, "module inside another": nn.ModuleDict({"net": base})}[kind]


SOURCES = ["module", "state dict", "file", "checkpoint of a LightningModule", "module inside another"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_running_statistics_are_fused_and_counts_and_constants_are_left(tmp_path, source, alpha):
    base, sft, x = _pair()
    before, there = copy.deepcopy(sft.state_dict()), copy.deepcopy(base.state_dict())
    report = rejuvenate(sft, _as(source, base, tmp_path), alpha=alpha)
    for name, tensor in sft.state_dict().items():
        if name == "norm.num_batches_tracked":
            assert tensor == before[name] != there[name]
        else:
            expected = alpha * before[name].double() + (1 - alpha) * there[name].double()
            torch.testing.assert_close(tensor, expected.float())
    assert torch.equal(sft.inv_freq, torch.full((3,), 3.0))
    assert all(torch.equal(b, there[n]) for n, b in base.state_dict().items())
    assert report.running_statistics == ["norm"]
    assert report.buffers_kept == []
    assert set(report.buffers_fused) == (
        {"norm.running_mean", "norm.running_var", "scale"} if alpha < 1 else set()
    )
    if alpha == 0.0:
        sft.inv_freq.copy_(base.inv_freq)
        assert torch.equal(sft(x), base(x))
    assert ("update_bn" in str(report)) == (alpha > 0)


def test_the_report_says_which_buffers_an_anchor_of_parameters_leaves():
    base, sft, _ = _pair()
    before = copy.deepcopy(sft.state_dict())
    parameters = {name: p.detach() for name, p in base.named_parameters()}
    report = rejuvenate(sft, parameters, alpha=0.0)
    assert set(report.buffers_kept) == {"norm.running_mean", "norm.running_var", "scale"}
    assert report.buffers_fused == []
    assert all(torch.equal(b, before[n]) for n, b in sft.named_buffers() if n in before)
    assert "3 left, since the anchor does not hold them" in str(report)
    assert "recompute them (torch.optim.swa_utils.update_bn)" in str(report)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_routers_correction_is_fused_as_the_command_does(tmp_path, alpha):
    base = tiny("deepseek_v3")
    sft = shifted(base, 0.05)
    generator = torch.Generator().manual_seed(3)
    for model in (base, sft):
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    for name, model in (("base", base), ("sft", sft)):
        model.save_pretrained(tmp_path / name)
    rejuvenate_checkpoint(tmp_path / "base", tmp_path / "sft", tmp_path / "out", alpha=alpha)
    written = load_file(tmp_path / "out" / "model.safetensors")
    report = rejuvenate(sft, base, alpha=alpha)
    assert [name.rpartition(".")[2] for name in report.buffers_fused] == ["e_score_correction_bias"]
    sft.save_pretrained(tmp_path / "python")
    ours = load_file(tmp_path / "python" / "model.safetensors")
    assert ours.keys() == written.keys()
    assert all(torch.equal(ours[name], written[name]) for name in ours)
    if alpha == 0.0:
        ids = batch(vocabulary=61)["input_ids"]
        assert torch.equal(sft(input_ids=ids).logits, base(input_ids=ids).logits)


def test_a_search_looks_at_the_buffers_too():
    """At alpha = 0 the model holds the anchor's buffers, and afterwards its own again."""
    base, sft = tiny("deepseek_v3"), None
    sft = shifted(base, 0.05)
    name, bias = next((n, b) for n, b in sft.named_buffers() if n.endswith("e_score_correction_bias"))
    bias += torch.arange(len(bias))
    seen, before = [], bias.clone()

    def sampler(model):
        seen.append(model.get_buffer(name).clone())
        return [batch(vocabulary=61)]

    with pytest.raises(ValueError, match="sampled batch 1"):
        rejuvenate(sft, base, [batch(vocabulary=61)], sampler=lambda m: [*sampler(m), {}])
    assert torch.equal(seen[0], base.get_buffer(name))
    assert torch.equal(sft.get_buffer(name), before)


def test_patterns_of_alpha_and_half_types_cover_buffers():
    base, sft, _ = _pair()
    base, sft = base.bfloat16(), sft.bfloat16()
    there, before = base.state_dict(), copy.deepcopy(sft.state_dict())
    alphas = {"norm.running_*": 0.0, "norm.*": 0.5, "*": 1.0}
    rejuvenate(sft, base, alpha=alphas, rounding="stochastic")
    assert torch.equal(sft.norm.running_mean, there["norm.running_mean"])
    assert torch.equal(sft.scale, before["scale"])
    with pytest.raises(ValueError, match=r"no pattern fits \['norm.running_mean'"):
        rejuvenate(sft, base, alpha={"*weight": 0.5, "*bias": 0.5})


@pytest.mark.parametrize("whose", ["model", "anchor"])
def test_buffers_that_are_not_finite_are_refused(whose):
    base, sft, _ = _pair()
    (sft if whose == "model" else base).norm.running_var[1] = float("nan")
    before = copy.deepcopy(sft.state_dict())
    with pytest.raises(ValueError, match=rf"finite buffers but the {whose}.* in \['norm.running_var'\]"):
        rejuvenate(sft, base, alpha=0.5)
    assert all(torch.equal(t, before[n]) or n == "norm.running_var" for n, t in sft.state_dict().items())


def test_names_beside_parameters():
    there = beside(
        {"model.language_model.a.weight": "language_model.model.a.weight", "visual.b.w": "model.visual.b.w"}
    )
    assert there("model.language_model.a.bias") == "language_model.model.a.bias"
    assert there("visual.b.mean") == "model.visual.b.mean"
    assert beside({"a.weight": "a.weight"})("mean") == "mean"
