"""Logits and statistics at chosen positions: those of all logits, whatever a model does around its head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_rejuv import PlasticityMonitor
from lightning_rejuv.forward import evaluation_mode, forward_logits
from lightning_rejuv.logits import logits_at, stats_at
from lightning_rejuv.metrics import _probe
from lightning_rejuv.ops import token_stats
from tests.conftest import batch, tiny_llama
from tests.families import tiny
from tests.processes import run_in_processes
from tests.sharding import fsdp1, fsdp2, tensor_parallel

IDS = torch.randint(3, 21, (3, 7), generator=torch.Generator().manual_seed(0))
WHERE = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [0] * 7, [1, 0, 0, 0, 0, 1, 1]]).bool()
TARGETS = IDS.roll(-1, 1)[WHERE]
BF16 = torch.bfloat16


def llama(**changes):
    return tiny_llama(**changes)


def subclass(forward):
    """A Llama whose own `forward` does something around the head."""
    from transformers import LlamaForCausalLM

    class Changed(LlamaForCausalLM):
        pass

    Changed.forward = forward
    model = llama()
    model.__class__ = Changed
    return model


def _hidden(self, input_ids):
    return self.model(input_ids=input_ids, use_cache=False).last_hidden_state


def functional_head(self, input_ids):
    return nn.functional.linear(_hidden(self, input_ids), self.lm_head.weight)


def flat_head(self, input_ids):
    hidden = _hidden(self, input_ids)
    return self.lm_head(hidden.flatten(0, 1)).view(*input_ids.shape, -1)


def viewed(self, input_ids):
    return self.lm_head(_hidden(self, input_ids)).view(*input_ids.shape, -1)


def twice(self, input_ids):
    hidden = _hidden(self, input_ids)
    return self.lm_head(hidden) - 0.5 * self.lm_head(hidden.roll(1, 1))


def per_position(self, input_ids):
    logits = self.lm_head(_hidden(self, input_ids))
    return logits * torch.linspace(0.5, 2, input_ids.shape[1])[:, None]


def by_row(self, input_ids):
    return self.lm_head(_hidden(self, input_ids)) * torch.linspace(0.5, 2, len(input_ids))[:, None, None]


def in_place(self, input_ids):
    logits = self.lm_head(_hidden(self, input_ids))
    if logits.requires_grad:
        return logits * 0.5
    return logits.mul_(0.5)


def capped(self, input_ids):
    return 3 * (self.lm_head(_hidden(self, input_ids)) / 3).tanh()


def reversed_tokens(self, input_ids):
    return self.lm_head(_hidden(self, input_ids)).flip(-1)


def without_padding(self, input_ids):
    """A vocabulary whose last tokens are padding: a view that begins where the head's output does."""
    return self.lm_head(_hidden(self, input_ids))[..., :21]


class Custom(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(23, 8), nn.Linear(8, 23)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).cumsum(1)).cumsum(1)  # mixes positions after its head


class Passing(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).logits * 0.5


class Contrast(nn.Module):
    """A trained model beside a frozen one, whose logits it takes away."""

    def __init__(self):
        super().__init__()
        self.model, self.other = llama(), llama(seed=1).requires_grad_(False)

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits - self.other(input_ids=input_ids).logits


def adapted(target):
    import peft

    config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
    return peft.get_peft_model(llama(), config).eval()


def saved_as_a_whole():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(llama(), config).eval()


def hooked():
    model = llama()
    model.lm_head.register_forward_hook(
        lambda _m, _a, out: out.masked_fill(torch.arange(23) >= 20, -torch.inf)
    )
    return model


def replaced_forward():
    model = llama()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden).flip(-1)
    return model


def parametrized():
    model = llama()

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Double())
    return model


def with_bias():
    model = llama()
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 23))
    return model


MODELS = {
    **{
        name: (lambda name=name: tiny(name))
        for name in (*("llama/tied", "gemma2", "cohere", "granite", "gptj", "bloom", "gpt_oss"),)
    },
    **{
        forward.__name__: (lambda forward=forward: subclass(forward))
        for forward in (
            *(functional_head, flat_head, viewed, twice, per_position, by_row, in_place, capped),
            *(reversed_tokens, without_padding),
        )
    },
    "custom": Custom,
    "passing": lambda: Passing(llama()),
    "contrast": Contrast,
    "lora": lambda: adapted(["q_proj"]),
    "lora_head": lambda: adapted(["q_proj", "lm_head"]),
    "saved_as_a_whole": saved_as_a_whole,
    "hooked": hooked,
    "replaced_forward": replaced_forward,
    "parametrized": parametrized,
    "with_bias": with_bias,
    "compiled": lambda: torch.compile(llama(), backend="eager"),
}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow if n == "compiled" else ()) for n in MODELS])
def model(request):
    return MODELS[request.param]()


def test_logits_and_their_gradients_are_those_of_all_logits(model):
    inputs = {"input_ids": IDS}
    found, gradients = [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for logits in (
        lambda: logits_at(model, inputs, WHERE),
        lambda: forward_logits(model, inputs)[WHERE],
        lambda: logits_at(model, inputs, WHERE),
    ):
        found.append(logits())
        finite = found[-1].nan_to_num(neginf=0.0)
        gradients.append(torch.autograd.grad(finite.square().sum(), parameters, allow_unused=True))
    for index in (0, 2):
        torch.testing.assert_close(found[index], found[1], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(gradients[index], gradients[1], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_statistics_are_those_of_all_logits(model, temperature):
    inputs = {"input_ids": IDS}
    with torch.no_grad():
        expected = token_stats(forward_logits(model, inputs)[WHERE].double(), TARGETS, temperature)
    for _ in range(2):  # the second time it is known how far the model can go
        found = stats_at(model, inputs, WHERE, TARGETS, temperature)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_hook_is_left_and_a_model_that_fails_fails(model):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()
    inner = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    handle = inner.register_forward_hook(lambda *_: 1 / 0)
    for function in (
        lambda: logits_at(model, {"input_ids": IDS}, WHERE),
        lambda: stats_at(model, {"input_ids": IDS}, WHERE, TARGETS),
    ):
        with evaluation_mode(model), pytest.raises(ZeroDivisionError):
            function()
    handle.remove()
    with evaluation_mode(model):
        stats_at(model, {"input_ids": IDS}, WHERE, TARGETS)
    assert hooks() == before


def test_an_error_after_the_head_is_the_models_own():
    model = llama()
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_at(model, {"input_ids": IDS}, WHERE)
    assert not model.lm_head._forward_pre_hooks
    assert not model.lm_head._forward_hooks


def seen_by_head(model, function):
    """How many positions the head is run on, pass by pass."""
    seen, linear = [], nn.functional.linear

    def counting(hidden, weight, bias=None):
        if weight is model.get_output_embeddings().weight:
            seen.append(hidden.shape[:-1].numel())
        return linear(hidden, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", counting)
        function()
    return seen


def test_a_head_is_run_on_the_chosen_positions_alone():
    inputs = {"input_ids": IDS}
    model = llama()
    assert seen_by_head(model, lambda: logits_at(model, inputs, WHERE)) == [6]
    assert seen_by_head(model, lambda: stats_at(model, inputs, WHERE, TARGETS)) == [1]
    # A cap is seen at the first pass, and known from then on.
    model = tiny("gemma2")
    assert seen_by_head(model, lambda: stats_at(model, inputs, WHERE, TARGETS)) == [1, 6]
    assert seen_by_head(model, lambda: stats_at(model, inputs, WHERE, TARGETS)) == [6]
    model = subclass(viewed)
    assert seen_by_head(model, lambda: logits_at(model, inputs, WHERE)) == [6, 21]
    assert seen_by_head(model, lambda: stats_at(model, inputs, WHERE, TARGETS)) == [21]
    other = copy.deepcopy(model)  # of which nothing is known yet
    assert seen_by_head(other, lambda: logits_at(other, inputs, WHERE)) == [6, 21]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_half_types_do_not_round_what_is_taken_from_the_heads_input(dtype):
    model, hidden = tiny_llama(dtype=dtype), []
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # peaked, as after SFT
    handle = model.lm_head.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    found = stats_at(model, {"input_ids": IDS}, WHERE, TARGETS)
    handle.remove()
    with torch.no_grad():
        exact = token_stats(hidden[0][WHERE].double() @ model.lm_head.weight.double().t(), TARGETS)
        before = token_stats(forward_logits(model, {"input_ids": IDS})[WHERE], TARGETS)
    for name in ("entropy", "logprob"):
        ours, rounded, right = (getattr(stats, name) for stats in (found, before, exact))
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
        assert (rounded - right).abs().max() > 100 * (ours - right).abs().max()


def test_logits_that_overflow_are_not_taken_in_float32():
    model = tiny_llama(dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(6e4 / model.lm_head.weight.abs().max())
        expected = token_stats(forward_logits(model, {"input_ids": IDS})[WHERE], TARGETS)
    assert expected.entropy.isnan().any()
    found = stats_at(model, {"input_ids": IDS}, WHERE, TARGETS)
    torch.testing.assert_close(found.entropy, expected.entropy, equal_nan=True)


def test_under_autocast_the_head_is_taken_in_float32():
    model = llama()
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    with evaluation_mode(model), torch.autocast("cpu", BF16):
        found = stats_at(model, {"input_ids": IDS}, WHERE, TARGETS)
    exact = token_stats(hidden[0][WHERE].double() @ model.lm_head.weight.detach().double().t(), TARGETS)
    torch.testing.assert_close(found.entropy, exact.entropy, rtol=1e-5, atol=1e-6)


def test_in_inference_mode_it_is_not_known_what_has_been_changed():
    with torch.inference_mode():
        model = subclass(in_place)
        expected = token_stats(forward_logits(model, {"input_ids": IDS})[WHERE], TARGETS)
        found = stats_at(model, {"input_ids": IDS}, WHERE, TARGETS)
    torch.testing.assert_close(found.entropy, expected.entropy)


def test_a_target_without_a_logit_is_refused_also_where_no_logits_are_made():
    targets = TARGETS.clone()
    targets[2] = 23
    with pytest.raises(TypeError, match="it returns 23 for token 23"):
        stats_at(llama(), {"input_ids": IDS}, WHERE, targets)


def test_no_position_is_no_statistic():
    nowhere = torch.zeros_like(WHERE)
    found = stats_at(llama(), {"input_ids": IDS}, nowhere, TARGETS[:0])
    assert [len(values) for values in found] == [0] * 5
    assert logits_at(llama(), {"input_ids": IDS}, nowhere).shape == (0, 23)


@pytest.mark.parametrize("forward", [capped, viewed])
def test_a_monitor_records_a_pass_that_is_made_again_once(forward, monkeypatch):
    probe = [batch(), batch(seed=1)]
    values = []
    for again in (True, False):
        model = subclass(forward)
        if not again:
            monkeypatch.setattr(
                _probe,
                "stats_at",
                lambda model, inputs, where, targets, temperature: token_stats(
                    forward_logits(model, inputs)[where], targets, temperature
                ),
            )
        monitor = PlasticityMonitor(probe=probe)
        values.append({name: float(value) for name, value in monitor.measure(model).items()})
        tables = monitor._of_sites()[0]
        values[-1]["tokens"] = float(next(iter(tables.values())).sum())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def sharded_head(model):
    """The head's columns are spread over processes, whose logits are put together."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(tensor_parallel(model, mesh), mesh, plan)


@pytest.mark.parametrize("shard", [fsdp2, fsdp1, tensor_parallel, sharded_head])
def test_statistics_of_a_sharded_model_are_those_of_the_whole(shard, tmp_path):
    expected = stats_at(llama(), {"input_ids": IDS}, WHERE, TARGETS)

    def work(rank):
        model = shard(llama())
        with evaluation_mode(model):
            passes = [stats_at(model, {"input_ids": IDS}, WHERE, TARGETS) for _ in range(2)]
        return [(stats.entropy.tolist(), stats.logprob.tolist()) for stats in passes]

    for passes in run_in_processes(work, tmp_path):
        for entropy, logprob in passes:
            assert entropy == pytest.approx(expected.entropy.tolist(), rel=1e-5, abs=1e-5)
            assert logprob == pytest.approx(expected.logprob.tolist(), rel=1e-5, abs=1e-5)
