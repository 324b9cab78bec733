"""Optimizers that hold weights: the same edit is made of them, or they are refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.optimizer_weights import WeightCopies, unwrapped
from tests.conftest import greedy_batch, sharpened, tiny_llama


class Plain(torch.optim.Optimizer):
    """SGD without momentum, for others to build on."""

    def __init__(self, params, lr=0.1, **options):
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, self.state[p], group, p.grad * group["lr"])


class Master(Plain):
    """A float32 master of every half-precision parameter."""

    def move(self, p, state, group, change):
        master = state.setdefault("main", p.detach().float().clone())
        p.copy_(master.sub_(change.float()))


class ScheduleFree(Plain):
    """The parameter lies between `z` and the average `x`, which is kept nowhere (arXiv 2405.15682)."""

    def move(self, p, state, group, change):
        z = state.setdefault("z", p.detach().clone())
        x = (p - 0.1 * z) / 0.9
        group["weight_sum"] = group.get("weight_sum", 0) + 1
        z.sub_(change)
        x = torch.lerp(x, z, 1 / (2 + group["weight_sum"]))
        p.copy_(0.9 * x + 0.1 * z)


class Dual(Plain):
    """The parameter is a running mean of the start minus a sum, as in dual averaging with momentum."""

    def move(self, p, state, group, change):
        x0 = state.setdefault("x0", p.detach().clone())
        s = state.setdefault("s", torch.zeros_like(p)).add_(change)
        p.lerp_(x0 - s, 0.5)


class Lookahead(torch.optim.Optimizer):
    """Around another optimizer, with a state of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = {p: {"slow": p.detach().clone()} for group in self.param_groups for p in group["params"]}
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.steps += 1
        if self.steps % 3 == 0:
            for p, state in self.state.items():
                state["slow"].lerp_(p, 0.5)
                p.copy_(state["slow"])


MAKES = {
    "master": Master,
    "schedule-free": ScheduleFree,
    "dual averaging": Dual,
    "lookahead": lambda p: Lookahead(Sgd(p)),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=1, lambd=0),
}


class Sgd(Plain):
    def move(self, p, state, group, change):
        p.sub_(change)


def train(net, optimizer, steps, scale=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in net.parameters():
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def expected(net, base, alpha):
    """The fusion, in float64."""
    there = dict(base.named_parameters())
    return {n: alpha * p.double() + (1 - alpha) * there[n].double() for n, p in net.named_parameters()}


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(6, 5).to(dtype), nn.Linear(6, 5).to(dtype)


@pytest.mark.parametrize("mode", ["momentum", "keep"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_what_the_optimizer_averages_goes_on_from_edited_weights(make, mode):
    """With zero gradients, fusing commutes with whatever the optimizer does between its copies."""
    dtype = torch.bfloat16 if make is Master else torch.float32
    base, edited = pair(dtype)
    plain = copy.deepcopy(edited)
    runs = [(net, make(net.parameters())) for net in (edited, plain)]
    for net, optimizer in runs:
        train(net, optimizer, 7)
    report = rejuvenate(edited, base, alpha=0.3, optimizer=runs[0][1], optimizer_state=mode)
    assert report.optimizer_state_left == []
    for _ in range(6):
        for net, optimizer in runs:
            train(net, optimizer, 1, scale=0.0)
        for name, value in expected(plain, base, 0.3).items():
            here = dict(edited.named_parameters())[name].double()
            torch.testing.assert_close(here, value, atol=8e-3 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    if make is MAKES["asgd"]:
        for (p, q), anchor in zip(
            zip(edited.parameters(), plain.parameters(), strict=True), base.parameters(), strict=True
        ):
            ours, theirs = runs[0][1].state[p]["ax"], runs[1][1].state[q]["ax"]
            torch.testing.assert_close(ours, 0.3 * theirs + 0.7 * anchor)


def test_a_master_keeps_what_half_precision_loses():
    base, net = pair(torch.bfloat16)
    optimizer = Master(net.parameters())
    train(net, optimizer, 3, scale=1e-3)
    masters = {n: optimizer.state[p]["main"].double() for n, p in net.named_parameters()}
    rejuvenate(net, base, alpha=0.3, optimizer=optimizer)
    there = dict(base.named_parameters())
    for name, p in net.named_parameters():
        value = 0.3 * masters[name] + 0.7 * there[name].double()
        torch.testing.assert_close(optimizer.state[p]["main"].double(), value, atol=1e-7, rtol=1e-6)


def test_a_reset_edits_the_same_rows_and_columns_of_a_copy():
    base = tiny_llama()
    net = sharpened(base)
    optimizer = Master(net.parameters(), lr=0.0)
    net(**greedy_batch(base)).loss.backward()
    optimizer.step()
    rejuvenate(net, base, [greedy_batch(base)], alpha=1.0, reset=Reset(fraction=0.1), optimizer=optimizer)
    assert all(torch.equal(state["main"], p) for p, state in optimizer.state.items())


@pytest.mark.parametrize("stride", [1, 7])
def test_the_flat_start_of_prodigy_is_fused(stride):
    base, net = pair()
    nn.init.zeros_(net.bias)
    optimizer = Sgd(net.parameters(), slice_p=stride)
    start = torch.randn(30)[::stride]
    optimizer.state[net.weight] = {"p0": start.clone(), "s": torch.ones_like(start)}
    optimizer.state[net.bias] = {"p0": torch.tensor(0.0), "s": torch.zeros(5)[::stride]}
    report = rejuvenate(net, base, alpha=0.3, optimizer=optimizer)
    anchor = base.weight.detach().flatten()[::stride]
    torch.testing.assert_close(optimizer.state[net.weight]["p0"], 0.3 * start + 0.7 * anchor)
    torch.testing.assert_close(optimizer.state[net.bias]["p0"], 0.7 * base.bias.detach()[::stride])
    assert report.optimizer_state_left == []


def test_running_means_are_not_taken_for_weights():
    _, net = pair()
    makes = {
        "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
        "adadelta": torch.optim.Adadelta,
        "rprop": torch.optim.Rprop,
        "adagrad": torch.optim.Adagrad,
    }
    for name, make in makes.items():
        optimizer = make(net.parameters())
        train(net, optimizer, 5)
        assert not WeightCopies.find([optimizer], Layout(dict(net.named_parameters()))), name


class Gated(nn.Module):
    """A layer with a gain for each output and one for all of them, as CLIP's temperature is."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(2.0))
        self.layer, self.gains = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.layer(x) * self.gains * self.gate


@pytest.mark.parametrize(
    "make",
    [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.NAdam, torch.optim.ASGD],
)
def test_a_count_near_a_single_number_is_no_copy_of_it(make):
    """PyTorch's counts of steps are tensors of a scalar parameter's shape."""
    for steps in (1, 2, 3):
        torch.manual_seed(0)
        net, base = Gated(), Gated()
        optimizer = make(net.parameters(), lr=1e-3)
        train(net, optimizer, steps)
        keys = WeightCopies.find([optimizer], Layout(dict(net.named_parameters()))).keys
        assert [k for _, k in keys] == ([("ax",)] if make is torch.optim.ASGD else [])
        rejuvenate(net, base, alpha=0.5, optimizer=optimizer)
        train(net, optimizer, 1)
        assert all(float(optimizer.state[p]["step"]) == steps + 1 for p in net.parameters())


def test_a_decay_in_the_gradient_makes_no_copy_of_a_running_mean():
    _, net = pair()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    train(net, optimizer, 60, scale=0.0)
    weight = net.weight.detach()
    assert (optimizer.state[net.weight]["momentum_buffer"] - weight).norm() < 0.1 * weight.norm()
    assert not WeightCopies.find([optimizer], Layout(dict(net.named_parameters())))


@pytest.mark.parametrize("kind", ["squares", "NaN", "copy"])
def test_gains_near_one_are_told_from_what_has_grown_to_one(kind, monkeypatch):
    """What is known by no name is told by how its elements differ from their mean."""
    monkeypatch.setattr("lightning_rejuv.weights.optimizer_weights._PIECE", 7)
    torch.manual_seed(0)
    net = nn.LayerNorm(64, bias=False)
    with torch.no_grad():
        net.weight.add_(0.02 * torch.randn(64))
    held = {
        "squares": 1 + 0.02 * torch.randn(64),
        "NaN": torch.full((64,), torch.nan),
        "copy": net.weight.detach() + 0.002 * torch.randn(64),
    }
    optimizer = Sgd(net.parameters())
    optimizer.state[net.weight] = {"held": held[kind]}
    assert bool(WeightCopies.find([optimizer], Layout(dict(net.named_parameters())))) is (kind == "copy")


@pytest.mark.parametrize("mode", ["momentum", "keep"])
def test_the_remainder_of_kahan_summation_goes_with_the_old_weights(mode):
    base = tiny_llama().to(torch.bfloat16)
    net = sharpened(base)
    optimizer = Sgd(net.parameters())
    for p in net.parameters():
        optimizer.state[p] = {"kahan_comp": torch.full_like(p, 1e-4)}
    before = {p: p.detach().clone() for p in net.parameters()}
    data = [greedy_batch(base)]
    rejuvenate(
        net, base, data, alpha=1.0, reset=Reset(fraction=0.1), optimizer=optimizer, optimizer_state=mode
    )
    edited = 0
    for p, old in before.items():
        left = optimizer.state[p]["kahan_comp"]
        assert not left[p != old].any()
        edited += int((left == 0).sum())
    assert 0 < edited < sum(p.numel() for p in before)


def test_the_history_of_lbfgs_is_dropped():
    base, net = pair()
    x = torch.randn(8, 6)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        return loss

    for mode, steps in (("keep", 4), ("momentum", 0), ("reset", 0)):
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)
        optimizer.step(closure)
        rejuvenate(net, base, alpha=0.5, optimizer=optimizer, optimizer_state=mode)
        assert sum(s.get("n_iter", 0) for s in optimizer.state.values()) == steps


class Hidden(Sgd):
    """With float32 copies in an attribute, as Megatron's and torchao's optimizers have them."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params)
        self.main_groups = [[p.detach().float().clone() for p in params]]


def _linked(params):
    params = list(params)
    params[0].main_param = params[0].detach().float().clone()
    return Sgd(params)


class Ftrl(Sgd):
    pass


REFUSED = {
    "clones in its groups": (lambda p: Sgd([q.detach().float().clone() for q in p]), "holds clones of"),
    "one flat clone": (lambda p: Sgd([torch.cat([q.detach().flatten() for q in p])]), "steps others"),
    "copies in an attribute": (Hidden, r"Hidden\.main_groups"),
    "a copy on a parameter": (_linked, "the attribute `main_param`"),
    "weights made from a state": (Ftrl, "computes them from its state"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_edited_is_refused_before_anything_changes(make, message):
    base, net = pair(torch.bfloat16)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        rejuvenate(net, base, alpha=0.3, optimizer=make(net.parameters()))
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())


def test_an_optimizer_of_other_tensors_is_left_alone():
    base, net = pair()
    temperature = torch.zeros((), requires_grad=True)
    optimizers = [Sgd(net.parameters()), Sgd([temperature])]
    assert rejuvenate(net, base, alpha=0.3, optimizer=optimizers).drift_after > 0


def test_one_step_count_for_all_parameters_cannot_be_reset():
    base, net = pair()
    optimizer = Sgd(net.parameters(), betas=(0.9, 0.999), k=0)
    with pytest.raises(ValueError, match="share one step count"):
        rejuvenate(net, base, alpha=0.3, optimizer=optimizer, optimizer_state="reset")


def test_each_state_is_found_once():
    _, net = pair()
    inner = Sgd(net.parameters())
    outer = Lookahead(inner)
    assert list(unwrapped([outer, inner])) == [outer, inner]


def _real(name):
    if name == "ASGD":
        return lambda p: torch.optim.ASGD(p, lr=0.01)
    if name == "AdamWScheduleFree":
        package = pytest.importorskip("schedulefree")
        return lambda p: package.AdamWScheduleFree(p, lr=0.01)
    if name == "ScheduleFreeWrapper":
        package = pytest.importorskip("schedulefree")
        return lambda p: package.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.05))
    if name == "Prodigy":
        return lambda p: pytest.importorskip("prodigyopt").Prodigy(p)
    if name == "MADGRAD":
        return lambda p: pytest.importorskip("madgrad").MADGRAD(p, lr=0.01)
    if name == "DAdaptSGD":
        return lambda p: pytest.importorskip("dadaptation").DAdaptSGD(p, momentum=0.9)
    package = pytest.importorskip("pytorch_optimizer")
    if name == "Lookahead":
        return lambda p: package.Lookahead(torch.optim.SGD(p, lr=0.05))
    options = {"num_iterations": 100} if name == "Ranger21" else {}
    return lambda p: getattr(package, name)(p, lr=0.01, **options)


@pytest.mark.parametrize(
    "name",
    [
        "ASGD",
        "AdamWScheduleFree",
        "ScheduleFreeWrapper",
        "Prodigy",
        "MADGRAD",
        "DAdaptSGD",
        "Lookahead",
        "Ranger",
        "Ranger21",
    ],
)
def test_optimizers_of_other_packages_do_not_undo_the_edit(name):
    make = _real(name)
    base, net = pair()
    optimizer = make(net.parameters())
    getattr(optimizer, "train", lambda: None)()
    train(net, optimizer, 12, scale=1e-3)
    before = nn.utils.parameters_to_vector(net.parameters()).detach()
    rejuvenate(net, base, alpha=0.3, optimizer=optimizer)
    after = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    train(net, optimizer, 12, scale=0.0)
    getattr(optimizer, "eval", lambda: None)()
    then = nn.utils.parameters_to_vector(net.parameters()).detach()
    assert float((then - after).norm()) < 0.1 * float((before - after).norm())
