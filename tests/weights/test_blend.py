from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rejuv.weights import blend as blends
from lightning_rejuv.weights.blend import Blend, putting_back


def test_blend_restores_every_bit_also_after_an_error():
    net = torch.nn.Linear(3, 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    base = {k: torch.randn_like(v) for k, v in before.items()}
    with (
        pytest.raises(KeyError, match="inside"),
        Blend(dict(net.named_parameters()), base.__getitem__) as blend,
    ):
        blend.at(0.3)
        torch.testing.assert_close(net.weight.detach(), 0.3 * before["weight"] + 0.7 * base["weight"])
        blend.at(0.0)
        assert torch.equal(net.weight, base["weight"])
        raise KeyError("inside")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blend_under_autocast_runs_the_weights_that_it_has_put_in(dtype):
    net = torch.nn.Linear(3, 3, bias=False)
    own, base, x = net.weight.detach().clone(), torch.randn(3, 3), torch.randn(2, 3)
    expected = {alpha: x.to(dtype) @ torch.lerp(base, own, alpha).to(dtype).T for alpha in (1.0, 0.3, 0.0)}
    with torch.autocast("cpu", dtype):
        net(x)  # what was cached before
        with Blend(dict(net.named_parameters()), {"weight": base}.__getitem__) as blend:
            for alpha in (0.3, 0.0, 1.0, 0.3):
                blend.at(alpha)
                for _ in range(2):
                    torch.testing.assert_close(net(x), expected[alpha])
            assert not torch.is_autocast_cache_enabled()
        torch.testing.assert_close(net(x), expected[1.0])
        assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.7])
def test_a_blend_in_bfloat16_has_the_alpha_that_it_is_at(alpha):
    """Where SFT has moved weights by one unit in the last place, rounding to nearest would be all of it or nothing."""
    base = torch.full((200, 200), 1.0, dtype=torch.bfloat16)
    sft = torch.full((200, 200), 1.0078125, dtype=torch.bfloat16)
    weight = sft.clone()
    with Blend({"w": weight}, lambda name: base) as blend:
        seen = []
        for share in (alpha, 0.0, alpha, 1.0):
            blend.at(share)
            seen.append(weight.clone())
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], base)
    assert torch.equal(seen[3], sft)
    found = float((seen[0] == sft).double().mean())
    assert abs(found - alpha) < 5 * (alpha * (1 - alpha) / 40000) ** 0.5


def test_tensors_are_put_back_also_after_an_error():
    net = nn.BatchNorm1d(3)
    tensors = {**dict(net.named_parameters()), "running_mean": net.running_mean}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with pytest.raises(KeyboardInterrupt), putting_back(tensors), torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(float("nan"))
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


class InterruptedOnce(TorchDispatchMode):
    """Ctrl-C within the n-th copy from here on: not a number of it has been copied."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("how", ["put back", "blend"])
def test_an_interrupt_while_weights_are_put_back_waits_until_all_are(how, number):
    kept = {name: torch.randn(5) for name in "abc"}
    tensors = {name: tensor.clone() for name, tensor in kept.items()}
    with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
        if how == "put back":
            stack.enter_context(putting_back(tensors))
            for tensor in tensors.values():
                tensor.zero_()
        else:
            blend = stack.enter_context(Blend(tensors, lambda name: torch.zeros(5)))
            blend.at(0.25)
        assert not any(torch.equal(tensors[name], kept[name]) for name in kept)
        mode = InterruptedOnce(number)
        mode.__enter__()
    mode.__exit__(None, None, None)
    assert mode.left <= 0
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


@pytest.mark.parametrize(("unused", "room"), [(40, True), (10, False)])
def test_a_gpu_has_room_for_what_leaves_a_part_of_it_free(monkeypatch, unused, room):
    """Of 100 bytes 30 are free for all, and what this process holds without using it, too; 15 are asked for."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 + unused)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    assert blends.has_room(torch.device("cuda"), 15, 1 / 2) is room
    assert blends.has_room(torch.device("cuda"), 15, 1 / 4)
    assert blends.has_room(torch.device("cpu"), 1 << 60, 1 / 2)


def test_a_copy_for_which_there_is_no_room_is_kept_elsewhere(monkeypatch):
    monkeypatch.setattr(blends, "has_room", lambda device, size, part: False)
    net = torch.nn.Linear(3, 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with Blend(dict(net.named_parameters()), lambda name: torch.zeros_like(before[name])) as blend:
        blend.at(0.25)
        torch.testing.assert_close(net.weight.detach(), 0.25 * before["weight"])
        assert all(
            kept.data_ptr() != net.get_parameter(name).data_ptr() for name, kept in blend._kept.items()
        )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
