"""The monitor's hooks: what they count, when they fire, and that they are removed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_rejuv.metrics import PlasticityMonitor
from tests.conftest import tiny_llama
from tests.metrics.test_monitor import PROBE, clone_of, floats


def test_hooks_are_gone_after_an_error(llama):
    monitor = PlasticityMonitor()
    with pytest.raises(RuntimeError, match="stop"), monitor.attach(llama):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    assert monitor.compute() == {}


def test_nothing_holds_the_model():
    model = tiny_llama()
    monitor = PlasticityMonitor(anchor=clone_of(model), probe=PROBE)
    monitor.measure(model)
    with monitor.attach(model):
        model(**PROBE[0])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_attach_takes_the_mask_from_the_call(llama):
    b = PROBE[0]
    inputs = {k: b[k] for k in ("input_ids", "attention_mask")}
    with_labels, with_mask, unpadded = (PlasticityMonitor(rank_sites=None) for _ in range(3))
    with with_labels.attach(llama):
        llama(**b)
    probe = PlasticityMonitor(probe=[b], rank_sites=None)
    expected = probe.measure(llama)
    del expected["token_nll"]  # a training step's own loss is that
    assert floats(with_labels.compute()) == pytest.approx(floats(expected))
    with with_mask.attach(llama):
        llama(**inputs)
    rows = [row[m.bool()] for row, m in zip(b["input_ids"], b["attention_mask"], strict=True)]
    with unpadded.attach(llama):
        for row in rows:
            llama(input_ids=row[None])
    assert with_mask.compute()["dormancy_score_low"].item() == pytest.approx(
        unpadded.compute()["dormancy_score_low"].item(), rel=1e-4
    )
    assert "token_entropy" not in with_mask.compute()  # no labels, so no response is known


def test_attach_samples_steps(llama):
    every, first = PlasticityMonitor(), PlasticityMonitor()
    with every.attach(llama, every_n_steps=2):
        for b in (PROBE[0], PROBE[1], PROBE[0]):
            llama(**b)
    with first.attach(llama):
        llama(**PROBE[0])
        llama(**PROBE[0])
    assert floats(every.compute()) == pytest.approx(floats(first.compute()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_counted_twice(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)

        def forward(self, x):
            run = lambda v: self.fc2(self.act(self.up(v)))  # noqa: E731
            return checkpoint(run, x, use_reentrant=reentrant)

    net, monitor = Net(), PlasticityMonitor(rank_sites=None)
    with monitor.attach(net):
        net(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert monitor["activations/fc2"].table[-1, 0].item() == 5


def test_a_module_used_twice_is_two_sites():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 8), nn.Linear(8, 3), nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))))

    net, monitor = Net(), PlasticityMonitor()
    with torch.no_grad():
        net.a.weight.fill_(1)  # the first use is alive, the second dead: others report the last alone
        net.a.bias.fill_(1)
        net.b.weight.fill_(-1)
        net.b.bias.fill_(-1)
    x = torch.rand(6, 4)
    with monitor.attach(net):
        net(x)
        net(x)
    layers = monitor.layer_values()["dormant_fraction"]
    assert layers == {"relu": 0.0, "relu#2": 1.0}
    assert monitor.compute()["dormant_fraction"].item() == pytest.approx(3 / 11)


def test_equal_layers_are_not_merged():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    monitor = PlasticityMonitor(rank_sites=None)
    with torch.no_grad():
        for linear in (net[0], net[2]):
            linear.weight.copy_(torch.eye(4))
            linear.bias.zero_()
    with monitor.attach(net):
        net(torch.ones(2, 4))  # equal states at first: compute groups would merge the two for good
        with torch.no_grad():
            net[2].bias.fill_(-9)
        net(torch.ones(2, 4))
    assert monitor.layer_values()["active_fraction"] == {"1": 1.0, "3": 0.5}


@pytest.mark.parametrize("wrapped", [True, False])
def test_compiled_models(llama, wrapped):
    plain = PlasticityMonitor(probe=PROBE).measure(llama)
    model = copy.deepcopy(llama)
    if wrapped:
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    compiled(input_ids=PROBE[0]["input_ids"])  # hooks that come later do not fire in the graph
    monitor = PlasticityMonitor(probe=PROBE)
    assert floats(monitor.measure(compiled)) == pytest.approx(floats(plain))
    attached = PlasticityMonitor()
    with attached.attach(compiled):
        compiled(**PROBE[0])
    assert attached.compute()["dormancy_score_low"].isfinite()


def test_no_site_is_nan_and_a_warning():
    net, monitor = nn.Linear(3, 2), PlasticityMonitor()
    with monitor.attach(net):
        net(torch.randn(4, 3))
    with pytest.warns(UserWarning, match="Dormancy is NaN: no module was recorded"):
        assert monitor.compute()["dormant_fraction"].isnan()
    with pytest.raises(ValueError, match=r"'nothing' to match a module's name but the model has \['0'\]"):
        PlasticityMonitor(sites="nothing").attach(nn.Sequential(nn.Linear(2, 2))).__enter__()


def test_own_sites_of_both_kinds(llama):
    monitor = PlasticityMonitor(probe=PROBE, sites=r"o_proj$", rank_sites=r"layers\.\d+$")
    monitor.measure(llama)
    layers = monitor.layer_values()
    assert set(layers["dormancy_score_low"]) == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}
    assert set(layers["srank"]) == {"model.layers.0", "model.layers.1"}


def test_routed_tokens_are_left_out_and_said():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc2 = nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.fc2(torch.randn(3, 4))

    net, monitor = Net(), PlasticityMonitor(rank_sites=None)
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.warns(UserWarning, match=r"Not recorded: \['fc2'\].*routed experts"), monitor.attach(net):
        net(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_memory_does_not_grow_with_steps(llama):
    monitor = PlasticityMonitor()

    def size() -> int:
        return sum(v.numel() for m in monitor.values() for v in m.metric_state.values())

    with monitor.attach(llama):
        llama(**PROBE[0])
    small = size()
    for _ in range(3):
        with monitor.attach(llama):
            llama(**PROBE[1])
    assert size() == small
