"""What cannot be edited in place is refused by name, before anything has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.weights.open_targets import open_targets
from tests.conftest import shifted, tiny_llama


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def _refused(model, anchor, message, **options):
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=message):
        rejuvenate(model, anchor, **{"alpha": 0.5, **options})
    for name, parameter in model.named_parameters():
        assert parameter.is_meta or torch.equal(parameter, before[name])


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "older weight_norm": nn.utils.weight_norm,
    "older spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a step of one's own": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Softplus()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("route", ["fusion", "loss"])
def test_weights_that_are_computed_from_others(kind, route):
    base = _net()
    COMPUTED[kind](base[2])
    base(torch.ones(1, 4))
    sft = _net()
    COMPUTED[kind](sft[2])
    with torch.no_grad():
        for parameter in sft.parameters():
            parameter += 0.1
    options = {
        "calibration": [torch.ones(2, 4)],
        "loss": lambda m, x: m(x).sum(),
        "reset": Reset(fraction=0.2),
    }
    _refused(
        sft, base, r"computed from others.*remove_parametrizations", **(options if route == "loss" else {})
    )
    with pytest.raises(ValueError, match=r"\['2.weight \("):
        open_targets(sft, base)


def test_a_layer_is_taken_once_its_parametrization_is_removed():
    base, sft = _net(), shifted(_net(), 0.5)
    for model in (base, sft):
        parametrizations.weight_norm(model[2])
        parametrize.remove_parametrizations(model[2], "weight")
    middle = (base[2].weight + sft[2].weight).detach() / 2
    rejuvenate(sft, base, alpha=0.5)
    torch.testing.assert_close(sft[2].weight.detach(), middle)


@pytest.mark.parametrize("how", ["cpu", "disk", "a part", "without accelerate"])
def test_weights_on_the_meta_device(tmp_path, how):
    base = tiny_llama()
    sft = shifted(base)
    if how == "without accelerate":
        sft.model.layers[1].to("meta")
        _refused(sft, base, r"'model.layers.1.* on the meta device, without values")
        return
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    if how == "cpu":
        accelerate.cpu_offload(sft, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(sft, tmp_path / "offloaded", execution_device="cpu")
    else:
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(sft, places, main_device="cpu", offload_dir=tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in sft.parameters())
    _refused(sft, base, r"'model.layers.*on the meta device: accelerate has offloaded them.*`lightning-rejuv")


def test_an_anchor_on_the_meta_device():
    with torch.device("meta"):
        base = _net()
    _refused(_net(), base, r"the given module are on the meta device")
    _refused(_net(), base.state_dict(), r"the given state dict are on the meta device")


class _Averaged(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


SHARING = {
    "the module itself": lambda m: m,
    "its live state dict": lambda m: m.state_dict(),
    "its parameters": lambda m: dict(m.named_parameters()),
    "views of them": lambda m: {n: p.detach().view(-1).view(p.shape) for n, p in m.named_parameters()},
    "a wrapper": _Averaged,
    "a module with the same parameters": lambda m: nn.Sequential(*m),
    "one shared tensor": lambda m: {**copy.deepcopy(m).state_dict(), "2.bias": m[2].bias.detach()},
}


@pytest.mark.parametrize("kind", SHARING)
def test_an_anchor_that_would_move_along(kind):
    model = shifted(_net())
    _refused(model, SHARING[kind](model), r"shares its memory with the model.*'2.bias'.*copy.deepcopy")


@pytest.mark.parametrize("form", [lambda weight: weight, torch.t], ids=["as it is", "turned round"])
def test_two_parameters_in_one_memory_would_be_edited_twice(form):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    anchor = shifted(model)
    model[2].weight = nn.Parameter(form(model[0].weight.data))  # which does not tie them
    _refused(
        model, anchor, r"a memory of their own but \['0.weight and 2.weight'\] share one without being one"
    )
    model[2].weight = model[0].weight
    anchor[2].weight = anchor[0].weight
    expected = (model[0].weight.detach() + anchor[0].weight.detach()) / 2
    rejuvenate(model, anchor, alpha=0.5)
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_frozen_layers_may_be_shared_with_the_base():
    """As with a reference model that shares its lower layers: they are equal and stay so."""
    base = _net()
    sft = shifted(base, 0.5)
    sft[0] = base[0].requires_grad_(False)
    frozen = base[0].weight.clone()
    middle = (base[2].weight + sft[2].weight).detach() / 2
    rejuvenate(sft, base, alpha=0.5)
    torch.testing.assert_close(sft[2].weight.detach(), middle)
    assert torch.equal(base[0].weight, frozen)


NARROW = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("source", ["state dict", "file", "checkpoint", "distributed"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_anchor_of_another_kind_of_numbers(tmp_path, source, dtype):
    state = {name: tensor.clone() for name, tensor in _net().state_dict().items()}
    state["2.weight"] = state["2.weight"].to(dtype)
    anchor = state
    if source == "file":
        anchor = tmp_path / "base.safetensors"
        save_file(state, anchor)
    elif source == "checkpoint":
        anchor = tmp_path / "base.ckpt"
        torch.save(state, anchor)
    elif source == "distributed":
        import torch.distributed.checkpoint as dcp

        anchor = tmp_path / "base"
        dcp.save(state, checkpoint_id=anchor)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"16 bits or more but got \['2.weight \(torch.{kind}\)'\]"):
        open_targets(shifted(_net()), anchor)


def test_quantised_weights_in_whatever_form_they_are_kept():
    base, sft = _net(), shifted(_net())
    packed = copy.deepcopy(sft)
    packed[0].register_buffer("qweight", torch.zeros(4, 1, dtype=torch.int32))
    _refused(packed, base, r"'0.qweight \(torch.int32\)'")
    four_bits = copy.deepcopy(sft)
    four_bits[0].weight.quant_state = object()
    with pytest.raises(ValueError, match=r"'0.weight \(torch.float32\)'"):
        open_targets(four_bits, base)
    dynamic = nn.Sequential(_net(), nn.Linear(2, 2))
    dynamic[0] = torch.ao.nn.quantized.dynamic.Linear(4, 2)
    with pytest.raises(ValueError, match=r"'0 \(Linear\)'"):
        open_targets(dynamic, nn.Sequential(nn.Identity(), nn.Linear(2, 2)))
