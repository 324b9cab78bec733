from __future__ import annotations

import math

import pytest
import torch

from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.training import silence
from studies import landscape
from studies.files import read_seeds
from studies.landscape import RHO, Edit, curvatures, main, relative_sam_gap

pytestmark = pytest.mark.filterwarnings("ignore")
EDITS = {
    "base": Edit("base"),
    "sft_1": Edit("sft_1"),
    "fusion_40_reset_entropy": Edit(alpha=0.4, reset=True),
    "refit_40": Edit(alpha=1.0, refit=True),
    "auto_reset_entropy": Edit(reset=True),
}


def _quadratic(*scales):
    """``sum_i scale_i * |w_i|^2 / 2``, its parameters, and the norms of these."""
    parameters = [torch.full((2,), float(n + 1), dtype=torch.float64, requires_grad=True) for n in range(2)]

    def loss():
        return sum(scale * w.square().sum() / 2 for scale, w in zip(scales, parameters, strict=True))

    return loss, parameters, [math.sqrt(2), math.sqrt(8)]


def test_relative_gap_of_a_quadratic():
    """By hand: gradients a|w|, steps rho |w|^2 a|w| / s with s^2 = sum a^2 |w|^4, along w."""
    loss, parameters, norms = _quadratic(3.0, 0.5)
    slope = math.hypot(3.0 * norms[0] ** 2, 0.5 * norms[1] ** 2)
    moved = [
        w + 0.1 * w**2 * a * w / slope for a, w in zip((3.0, 0.5), norms, strict=True)
    ]  # new norms, as steps are along w
    expected = sum(a * (m**2 - w**2) / 2 for a, m, w in zip((3.0, 0.5), moved, norms, strict=True))
    before = [w.detach().clone() for w in parameters]
    assert relative_sam_gap(loss, parameters, 0.1) == pytest.approx(expected)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_relative_gap_does_not_change_when_weights_are_rescaled():
    """One tensor times 5 and its counterpart divided by 5: the same function, the same figure; SAM's differs."""
    from lightning_rejuv.functional import sam_gap

    found = []
    for scale in (1.0, 5.0):
        generator = torch.Generator().manual_seed(0)
        first = (scale * torch.randn(4, 3, generator=generator).double()).requires_grad_()
        second = (torch.randn(2, 4, generator=generator).double() / scale).requires_grad_()
        x = torch.randn(3, 7, generator=generator).double()

        def loss(first=first, second=second, x=x):
            return (second @ (first @ x).relu()).square().mean()

        pair = [first, second]
        found.append((relative_sam_gap(loss, pair, 0.01), float(sam_gap(loss, pair, 0.01))))
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[0][1] != pytest.approx(found[1][1], rel=0.05)


def test_a_flat_loss_has_no_gap():
    weight = torch.zeros(3, requires_grad=True)
    assert relative_sam_gap(lambda: weight.sum() * 0.0, [weight]) == 0.0


@pytest.mark.slow
def test_a_seed_is_measured_once_and_its_weights_are_left_alone(tmp_path, monkeypatch, capsys):
    silence()
    monkeypatch.setattr(landscape, "EDITS", EDITS)
    arguments = ["--tasks", "retail_desk", "--seeds", "902", "--miniature"]
    arguments += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    main(arguments)
    assert "no record of its base" in capsys.readouterr().out
    path = tmp_path / "out" / "retail_desk.jsonl"
    content = read_seeds(path)[902]
    # Without a record of the study there is no alpha of this one.
    assert list(content["arms"]) == [name for name in EDITS if name != "auto_reset_entropy"]
    assert set(content["where"]) == {"cpu", "torch", "transformers", "lightning-rejuv"}
    base, refit = content["arms"]["base"], content["arms"]["refit_40"]
    assert base["measures"]["relative_drift"] == base["measures"]["support"] == 0.0
    assert refit["base_samples"]["loss"] < base["base_samples"]["loss"]  # what refit descends
    assert refit["demonstrations"]["loss"] < base["demonstrations"]["loss"]

    before = path.read_text()
    main(arguments)  # nothing is missing
    assert path.read_text() == before

    (checkpoint,) = (found for found in (tmp_path / "cache").iterdir() if "-sft-" not in found.name)
    model = load_model(checkpoint)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(24).reshape(2, 12)
    found = curvatures(model, {"input_ids": tokens, "labels": tokens})
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    # A step along the gradient, made here anew.
    loss = model(input_ids=tokens, labels=tokens).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for parameter, g in zip(model.parameters(), gradients, strict=True):
            parameter.add_(RHO * g / norm)
        after = model(input_ids=tokens, labels=tokens).loss
    assert found["sam_gap"] == pytest.approx(float(after - loss.detach()), rel=1e-3)
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
