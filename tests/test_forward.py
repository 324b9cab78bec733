"""Running a model and leaving it as it was: under autocast, in inference mode, compiled; and other models."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_rejuv import PlasticityMonitor, RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.forward import evaluation_mode, forward_logits
from tests.callbacks.modules import Module, fit
from tests.checkpoints.families import tiny
from tests.conftest import greedy_batch, sharpened, tiny_llama

BF16 = torch.bfloat16


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base, 0.05)


def calibration(model):
    """What a model says, of any autocast."""
    with torch.autocast("cpu", enabled=False):
        return [greedy_batch(model, rows=8, seed=seed) for seed in range(2)]


def autocast(cached=True):
    return torch.autocast("cpu", BF16, cache_enabled=cached)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
def test_under_autocast_every_alpha_runs_its_own_weights(pair, quantity):
    base, sft = pair
    reports, models = [], []
    for cached in (True, False):
        model = copy.deepcopy(sft)
        with autocast(cached):
            model(**greedy_batch(base))  # fills the cache with the weights before
            options = {"reset": Reset(fraction=0.1, quantity=quantity, positions="entropy_gap")}
            reports.append(rejuvenate(model, base, calibration(sft), **options))
        models.append(model)
    assert reports[0].search.curve == reports[1].search.curve
    assert reports[0].comparison == reports[1].comparison
    assert equal(*models)
    plain = rejuvenate(copy.deepcopy(sft), base, calibration(sft))
    assert reports[0].alpha == pytest.approx(plain.alpha, abs=0.03)
    assert 0.3 < plain.alpha < 0.7


@pytest.mark.parametrize("options", [{}, {"reset": Reset(fraction=0.1)}], ids=["fusion", "reset"])
def test_under_autocast_the_edited_weights_are_run_afterwards(pair, options):
    base, sft = pair
    data = greedy_batch(base)
    with autocast():
        sft(**data)
        rejuvenate(sft, base, calibration(sft) if options else None, alpha=0.3, **options)
        found = sft(**data).logits
    with autocast(cached=False):
        expected = sft(**data).logits
    assert torch.equal(found, expected)


def test_a_model_that_enters_autocast_itself_inside_another(pair):
    base, sft = pair
    found = []
    for cached in (True, False):
        model = copy.deepcopy(sft)
        inner = torch.autocast("cpu", BF16, cache_enabled=cached)
        model.forward = inner(model.forward)
        with autocast():
            found.append(rejuvenate(model, base.state_dict(), calibration(sft), reset=Reset(fraction=0.1)))
    assert found[0].search.curve == found[1].search.curve
    assert found[0].comparison == found[1].comparison


@pytest.mark.parametrize("cached", [True, False])
def test_the_cache_is_left_as_it_was_also_after_an_error(pair, cached):
    base, sft = pair
    with autocast(cached):
        rejuvenate(sft, base, calibration(sft), alpha=0.5, reset=Reset(fraction=0.1))
        assert torch.is_autocast_cache_enabled() == cached
        with pytest.raises(ValueError, match="one bool for each"):
            rejuvenate(sft, base, calibration(sft), alpha="auto", verifier=lambda batch: True)
        assert torch.is_autocast_cache_enabled() == cached


def test_a_monitor_measures_under_autocast_what_it_measures_without_its_cache(pair):
    base, sft = pair
    found = []
    for cached in (True, False):
        monitor = PlasticityMonitor(copy.deepcopy(base.state_dict()), probe=calibration(base))
        with autocast(cached):
            sft(**greedy_batch(base))
            first = monitor.measure(sft)
            found.append((first, monitor.measure(base)))
    for a, b in zip(*found, strict=True):
        assert {k: float(v) for k, v in a.items()} == pytest.approx(
            {k: float(v) for k, v in b.items()}, nan_ok=True
        )


def test_mixed_precision_of_a_trainer_finds_the_alpha_of_autocast(pair, tmp_path):
    base, sft = pair
    module = Module(copy.deepcopy(sft), base)
    callback = RejuvenationCallback(base, at_start=True, calibration=calibration(sft))
    trainer: Trainer = fit(module, callback, tmp_path=tmp_path, precision="bf16-mixed", max_epochs=1)
    assert trainer.precision == "bf16-mixed"
    with autocast(cached=False):
        expected = rejuvenate(copy.deepcopy(sft), base, calibration(sft))
    assert callback.report.search.curve == expected.search.curve


def test_in_inference_mode_a_rejuvenation_is_the_same(pair):
    base, sft = pair
    inside, asked = copy.deepcopy(sft), copy.deepcopy(sft)
    expected = rejuvenate(sft, base, calibration(asked), reset=Reset(fraction=0.1))
    with torch.inference_mode():
        data, anchor = calibration(asked), copy.deepcopy(base)
        report = rejuvenate(inside, anchor, data, reset=Reset(fraction=0.1))
    assert report.search.curve == expected.search.curve
    assert equal(inside, sft)
    assert not any(p.is_inference() for p in inside.parameters())


def test_weights_made_in_inference_mode_are_fused_but_not_reset(pair):
    base, sft = pair
    with torch.inference_mode():
        model = copy.deepcopy(sft)
    before = copy.deepcopy(sft.state_dict())
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens.weight' was made inside `torch.inference_mode\(\)`"
    ):
        rejuvenate(model, base, calibration(base), alpha=0.5, reset=Reset(fraction=0.1))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    rejuvenate(model, base, alpha=0.5)
    rejuvenate(sft, base, alpha=0.5)
    assert equal(model, sft)


@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
def test_a_compiled_model_is_rejuvenated_as_the_model_in_it(pair, quantity):
    base, sft = pair
    model = copy.deepcopy(sft)
    compiled = torch.compile(model, backend="eager")
    compiled(**greedy_batch(base))
    options = {"alpha": 0.5, "reset": Reset(fraction=0.1, quantity=quantity, positions="entropy_gap")}
    rejuvenate(compiled, base, calibration(base), **options)
    rejuvenate(sft, base, calibration(base), **options)
    assert equal(model, sft)
    with torch.no_grad():
        found, expected = (m(**greedy_batch(base)).logits for m in (compiled, sft))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "SequenceClassification",
            {"alpha": 0.5, "reset": Reset(fraction=0.1)},
            r"\[batch, time, vocabulary\].* got LlamaForSequenceClass",
        ),
        (
            "SequenceClassification",
            {"sampler": None},
            "got LlamaForSequenceClassification.*Pass a number for `alpha`",
        ),
        (
            "TokenClassification",
            {"alpha": 0.5, "reset": Reset(fraction=0.1)},
            "got LlamaForTokenClassification.*`loss` for a reset",
        ),
        ("PooledClassifier", {"sampler": None}, r"PooledClassifier .* \(8, 9, V\) here, but got \(8, 2\)"),
        (
            "TokenClassifier",
            {"sampler": None},
            "TokenClassifier .* its vocabulary, but it returns 2 for token",
        ),
    ],
)
def test_a_classifier_is_no_language_model(pair, kind, options, message):
    import transformers

    base, _ = pair
    if kind.endswith("Classifier"):
        model = {"PooledClassifier": PooledClassifier, "TokenClassifier": TokenClassifier}[kind]()
    else:
        model = getattr(transformers, f"LlamaFor{kind}")(copy.deepcopy(base.config))
    other = sharpened_classifier(model)
    before = copy.deepcopy(other.state_dict())
    data = calibration(base)
    if "sampler" in options:
        options = {"alpha": "auto", "sampler": lambda _: data}
    with pytest.raises(TypeError, match=message):
        rejuvenate(other, model, data, **options)
    assert all(torch.equal(p, before[name]) for name, p in other.state_dict().items())


class TokenClassifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.score = torch.nn.Embedding(23, 4), torch.nn.Linear(4, 2)

    def forward(self, input_ids):
        return self.score(self.embed(input_ids))


class PooledClassifier(TokenClassifier):
    def forward(self, input_ids):
        return super().forward(input_ids)[:, -1]


def sharpened_classifier(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


class Passing(torch.nn.Module):
    """Passes on whatever it gets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


class Listing(Passing):
    """Takes what a batch has, and nothing else."""

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize(
    ("wrapper", "cached"),
    [(lambda model: model, False), (Passing, False), (Listing, True), (torch.compile, False)],
)
def test_no_pass_keeps_what_a_generation_would_need(wrapper, cached):
    model = tiny_llama().eval()
    kept = []
    model.register_forward_hook(lambda *call: kept.append(call[-1].past_key_values))
    batch = greedy_batch(model)
    expected = model(input_ids=batch["input_ids"]).logits
    with evaluation_mode(model):
        found = forward_logits(wrapper(model), {"input_ids": batch["input_ids"]})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [cache is not None for cache in kept[-2:]] == [True, cached]


def test_a_model_whose_cache_has_no_gradient_has_one_without():
    model = tiny("rwkv", 0, torch.float32).eval()
    ids = torch.arange(8, 20).view(2, 6)
    forward_logits(model, {"input_ids": ids}).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
