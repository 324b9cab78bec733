from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from lightning_rejuv import rejuvenate
from lightning_rejuv.neurons import take_apart
from tests.conftest import batch, greedy_batch, sharpened, shifted, tiny_llama


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


def calibration(base: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [greedy_batch(base, seed=0), greedy_batch(base, rows=2, seed=1)]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_fusion_alone_is_the_interpolation(pair):
    base, sft = pair
    before, anchor = _state(sft), _state(base)
    report = rejuvenate(sft, base, alpha=0.3, reset_fraction=0)
    for name, parameter in sft.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.3 * before[name] + 0.7 * anchor[name])
    assert all(torch.equal(p, anchor[n]) for n, p in base.named_parameters())
    assert report.attribution is None
    assert report.drift_after == pytest.approx(0.3 * report.drift_before, rel=1e-4)


def test_alpha_zero_is_the_anchor_and_the_neutral_options_change_no_bit(pair):
    base, sft = pair
    before = _state(sft)
    rejuvenate(sft, base, alpha=1.0, reset_fraction=0)
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())
    rejuvenate(sft, base, alpha=0.0, reset_fraction=0)
    assert all(torch.equal(p, q) for p, q in zip(sft.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("omega", [1.0, 0.4])
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_exactly_the_selected_rows_and_columns_return_to_the_base(pair, alpha, omega):
    base, sft = pair
    before, anchor = _state(sft), _state(base)
    fused = copy.deepcopy(sft)
    rejuvenate(fused, base, alpha=alpha, reset_fraction=0)
    fused_state = _state(fused)
    report = rejuvenate(sft, base, calibration(base), alpha=alpha, reset_fraction=0.1, omega=omega)
    groups = {g.parameter: g for g in take_apart(sft).groups}
    changed = 0
    for name, parameter in sft.named_parameters():
        if name not in groups:
            assert torch.equal(parameter, fused_state[name])
            continue
        dim = groups[name].dim
        moved = (parameter != fused_state[name]).any(1 - dim).nonzero().flatten()
        changed += len(moved)
        expected = omega * anchor[name] + (1 - omega) * fused_state[name]
        torch.testing.assert_close(parameter.index_select(dim, moved), expected.index_select(dim, moved))
        if omega == 1.0:
            assert torch.equal(parameter.index_select(dim, moved), anchor[name].index_select(dim, moved))
    assert changed == report.neurons_reset == round(0.1 * report.neurons)
    assert report.neurons == 2 * (16 + 8 + 8 + 16 + 12 + 12 + 12)
    assert any(not torch.equal(p, before[n]) for n, p in sft.named_parameters())


def test_a_bias_is_reset_with_its_row():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = Qwen2ForCausalLM(config)
    sft = sharpened(base)
    data = [batch(seed=s) for s in range(4)]
    rejuvenate(sft, base, data, alpha=1.0, reset_fraction=0.5, scope="module", positions="entropy_gap")
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (m.get_submodule(f"model.layers.0.self_attn.{name}") for m in (sft, base))
        rows = (ours.weight == theirs.weight).all(1)
        assert 0 < int(rows.sum()) < len(rows)
        assert torch.equal(rows, ours.bias == theirs.bias)


def test_the_attributed_model_is_the_sft_model_not_the_fused_one(pair):
    base, sft = pair
    chosen = []
    for alpha in (0.0, 1.0):
        model = copy.deepcopy(sft)
        report = rejuvenate(model, base, calibration(base), alpha=alpha, reset_fraction=0.1)
        chosen.append([tensor.reset for tensor in report.tensors])
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("option", "one", "other"),
    [
        ("positions", "sharpened", "entropy_gap"),
        ("positions_per_response", 1, 4),
        ("rank_by", "absolute", "signed"),
        ("rank_by", "absolute", "random"),
        ("scope", "model", "module"),
        ("scope", "module", "layer"),
        ("seed", 1, 2),
    ],
)
def test_no_option_is_ignored(pair, option, one, other):
    base, sft = pair
    results = []
    for value in (one, other):
        model = copy.deepcopy(sft)
        options = {"rank_by": "random"} if option == "seed" else {}
        data = [*calibration(base), batch()]
        rejuvenate(model, base, data, alpha=1.0, reset_fraction=0.1, **options, **{option: value})
        results.append(_state(model))
    assert any(not torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_the_random_control_resets_as_many_neurons_of_each_matrix(pair):
    base, sft = pair
    counts = {}
    for rank_by in ("absolute", "random"):
        report = rejuvenate(copy.deepcopy(sft), base, calibration(base), reset_fraction=0.1, rank_by=rank_by)
        counts[rank_by] = [tensor.reset for tensor in report.tensors]
    assert counts["absolute"] == counts["random"]


def test_automatic_alpha_meets_its_target_on_what_the_anchor_samples(pair):
    base, sft = pair
    seen = []

    def sampler(model):
        seen.append(_state(model))
        ids = torch.randint(0, 23, (64, 8), generator=torch.Generator().manual_seed(4))
        for time in range(3, 8):
            logits = model(input_ids=ids[:, :time]).logits[:, -1]
            ids[:, time] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        labels = ids.clone()
        labels[:, :3] = -100
        samples.append((ids, labels))
        return [{"input_ids": ids, "labels": labels}]

    samples: list = []
    fused = copy.deepcopy(sft)
    report = rejuvenate(
        fused, base, alpha="auto", reset_fraction=0, sampler=torch.no_grad()(sampler), target_excess=0.5
    )
    anchor = _state(base)
    assert all(
        torch.equal(p, anchor[n]) for n, p in seen[0].items()
    )  # the anchor's weights were in the model
    ids, _ = samples[0]

    @torch.no_grad()
    def nll(model):
        log_probs = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        return -float(log_probs.gather(2, ids[:, 1:, None])[:, 2:].sum()) / len(ids)

    def excess(alpha):
        model = copy.deepcopy(sft)
        rejuvenate(model, base, alpha=alpha, reset_fraction=0)
        return nll(model) - nll(base)

    assert nll(fused) - nll(base) <= 0.5 < excess(report.alpha + 0.01)
    assert report.search is not None
    for alpha, value in report.search.curve:
        assert excess(alpha) == pytest.approx(value, abs=1e-3)


def test_modes_gradients_hooks_and_random_states_are_left_as_they_were(pair):
    base, sft = pair
    sft.train()
    sft.model.layers[0].eval()
    sft.model.norm.weight.requires_grad_(False)
    gradient = torch.ones_like(sft.lm_head.weight)
    sft.lm_head.weight.grad = gradient
    modes = [m.training for m in sft.modules()]
    pointers = [p.data_ptr() for p in sft.parameters()]
    rng = torch.get_rng_state()
    rejuvenate(sft, base, calibration(base), rank_by="random")
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in sft.modules()]
    assert pointers == [p.data_ptr() for p in sft.parameters()]
    assert sft.lm_head.weight.grad is gradient
    assert not sft.model.norm.weight.requires_grad
    assert all(p.grad is None for p in sft.parameters() if p is not sft.lm_head.weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sft.modules())


def test_tied_embeddings_are_fused_once():
    base = tiny_llama(tie_word_embeddings=True)
    sft = sharpened(base)
    before, anchor = _state(sft), _state(base)
    rejuvenate(sft, base, calibration(base), alpha=0.5)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(sft.model.embed_tokens.weight, (before[name] + anchor[name]) / 2)
    assert sft.lm_head.weight is sft.model.embed_tokens.weight


def test_bfloat16_is_reset_bit_for_bit():
    base = tiny_llama(dtype=torch.bfloat16)
    sft = sharpened(base)
    report = rejuvenate(sft, base, calibration(base), alpha=1.0, reset_fraction=1.0)
    anchor = _state(base)
    groups = {g.parameter for g in take_apart(sft).groups}
    assert report.neurons_reset == report.neurons
    assert all(torch.equal(p, anchor[n]) for n, p in sft.named_parameters() if n in groups)


BAD = [
    ({"alpha": 1.2}, r"`alpha` to be a number in \[0, 1\] or \"auto\" but got 1.2"),
    ({"alpha": "half"}, "`alpha`"),
    ({"reset_fraction": -0.1}, "`reset_fraction`"),
    ({"omega": 2}, "`omega`"),
    ({"positions": "all"}, "`positions` to be one of"),
    ({"rank_by": "size"}, "`rank_by`"),
    ({"scope": "head"}, "`scope`"),
    ({"positions_per_response": 0}, "`positions_per_response`"),
    ({"alpha": "auto"}, "`sampler`"),
    ({"calibration": None}, "calibration batches but got None"),
    ({"calibration": []}, "iterable is empty"),
    ({"calibration": [{"input_ids": torch.ones(1, 3).long()}]}, "'labels'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_change_nothing(pair, options, message):
    base, sft = pair
    before = _state(sft)
    with pytest.raises(ValueError, match=message):
        rejuvenate(sft, base, **{"calibration": calibration(base), **options})
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())


def test_a_response_without_tokens_is_named(pair):
    base, sft = pair
    empty = batch()
    empty["labels"][1] = -100
    with pytest.raises(ValueError, match=r"calibration batch 1 .* rows \[1\] have none"):
        rejuvenate(sft, base, [batch(), empty])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(pair, value):
    base, sft = pair
    broken = copy.deepcopy(sft)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"the model holds NaN or infinity in \['model.layers.1.mlp.up_proj"):
        rejuvenate(broken, base, reset_fraction=0)
    with pytest.raises(ValueError, match=r"anchor \(the given module\) holds NaN or infinity"):
        rejuvenate(sft, broken, reset_fraction=0)


def test_an_anchor_that_is_the_model_is_refused(pair):
    base, _ = pair
    with pytest.raises(ValueError, match="equals the model in every parameter"):
        rejuvenate(base, copy.deepcopy(base), reset_fraction=0)


def test_a_family_that_the_map_does_not_know_is_refused_for_reset_only():
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    sft = shifted(base)
    with pytest.raises(ValueError, match="does not know the family None of Sequential"):
        rejuvenate(sft, base, [batch()])
    before, anchor = _state(sft), _state(base)
    rejuvenate(sft, base, reset_fraction=0)
    for name, parameter in sft.named_parameters():
        torch.testing.assert_close(parameter.detach(), (before[name] + anchor[name]) / 2)


def test_an_error_during_calibration_leaves_the_model_as_it_was(pair):
    base, sft = pair
    before = _state(sft)
    too_large = batch(vocabulary=500)
    with pytest.raises(IndexError):
        rejuvenate(sft, base, [batch(), too_large])
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sft.modules())


def test_the_report_is_a_table_and_a_file(pair, tmp_path):
    base, sft = pair
    report = rejuvenate(sft, base, calibration(base), alpha=0.4, reset_fraction=0.1)
    text = str(report)
    assert "alpha            0.400" in text
    assert f"{report.neurons_reset} of {report.neurons}" in text
    assert report.attribution is not None
    assert report.attribution.reconstruction_error < 1e-5
    report.save(tmp_path / "report.json")
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert loaded == json.loads(json.dumps(report.to_dict()))
    assert sum(t["reset"] for t in loaded["tensors"]) == report.neurons_reset == loaded["neurons_reset"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
