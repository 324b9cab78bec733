from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.neurons import find_decoder
from tests.conftest import batch, float64_llama, greedy_batch, sharpened, shift_of_alpha, shifted, tiny_llama


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
    report = rejuvenate(sft, base, alpha=0.3)
    for name, parameter in sft.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.3 * before[name] + 0.7 * anchor[name])
    assert all(torch.equal(p, anchor[n]) for n, p in base.named_parameters())
    assert report.attribution is None
    assert report.drift_after == pytest.approx(0.3 * report.drift_before, rel=1e-4)


def test_alpha_zero_is_the_anchor_and_the_neutral_options_change_no_bit(pair):
    base, sft = pair
    before = _state(sft)
    rejuvenate(sft, base, alpha=1.0)
    assert all(torch.equal(p, before[n]) for n, p in sft.named_parameters())
    rejuvenate(sft, base, alpha=0.0)
    assert all(torch.equal(p, q) for p, q in zip(sft.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("omega", [1.0, 0.4])
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_exactly_the_selected_rows_and_columns_return_to_the_base(pair, alpha, omega):
    base, sft = pair
    before, anchor = _state(sft), _state(base)
    fused = copy.deepcopy(sft)
    rejuvenate(fused, base, alpha=alpha)
    fused_state = _state(fused)
    report = rejuvenate(sft, base, calibration(base), alpha=alpha, reset=Reset(fraction=0.1, omega=omega))
    groups = {g.parameter: g for g in find_decoder(sft).groups}
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
    assert changed == report.neurons_reset == round(0.1 * report.neurons_total)
    assert report.neurons_total == 2 * (16 + 8 + 8 + 16 + 12 + 12 + 12)
    assert any(not torch.equal(p, before[n]) for n, p in sft.named_parameters())


@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
def test_a_bias_is_reset_with_its_row(quantity):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(config)
    sft = sharpened(base)
    data = [batch(seed=s) for s in range(4)]
    reset = Reset(0.5, scope="module", positions="entropy_gap", quantity=quantity, rank_by="absolute")
    rejuvenate(sft, base, data, alpha=1.0, reset=reset)
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (m.get_submodule(f"model.layers.0.self_attn.{name}") for m in (sft, base))
        rows = (ours.weight == theirs.weight).all(1)
        assert int(rows.sum()) == len(rows) // 2
        assert torch.equal(rows, ours.bias == theirs.bias)


def test_the_logit_is_attributed_in_the_sft_model_not_in_the_fused_one(pair):
    base, sft = pair
    chosen = []
    for alpha in (0.0, 1.0):
        model = copy.deepcopy(sft)
        options = {"alpha": alpha, "reset": Reset(fraction=0.1, quantity="target_logit")}
        report = rejuvenate(model, base, calibration(base), **options)
        chosen.append([group.reset for group in report.neurons])
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("option", "one", "other"),
    [
        ("positions", "sharpened", "entropy_gap"),
        ("positions_per_response", 1, 4),
        ("rank_by", "absolute", "signed"),
        ("rank_by", None, "absolute"),
        ("rank_by", None, "random"),
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
        seed = {"seed": value} if option == "seed" else {}
        reset = Reset(0.1, **({"rank_by": "random"} if seed else {option: value}))
        data = [*calibration(base), batch()]
        rejuvenate(model, base, data, alpha=1.0, reset=reset, **seed)
        results.append(_state(model))
    assert any(not torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize(
    ("quantity", "ranking"), [("entropy_gradient", "signed"), ("target_logit", "absolute")]
)
def test_each_quantity_has_a_ranking_and_its_control_resets_as_many_of_each_matrix(pair, quantity, ranking):
    base, sft = pair
    counts = {}
    for rank_by in (None, "absolute", "signed", "random"):
        options = {"alpha": 0.9, "reset": Reset(fraction=0.1, quantity=quantity, rank_by=rank_by)}
        report = rejuvenate(copy.deepcopy(sft), base, calibration(base), **options)
        counts[rank_by] = [group.reset for group in report.neurons]
        assert report.attribution.rank_by == (rank_by or ranking)
    assert counts["absolute"] != counts["signed"]
    assert counts[None] == counts["random"] == counts[ranking]


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
    rejuvenate(sft, base, calibration(base), reset=Reset(fraction=0.1, rank_by="random"), alpha=0.5)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in sft.modules()]
    assert pointers == [p.data_ptr() for p in sft.parameters()]
    assert sft.lm_head.weight.grad is gradient
    assert not sft.model.norm.weight.requires_grad
    assert all(p.grad is None for p in sft.parameters() if p is not sft.lm_head.weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sft.modules())


def test_an_anchor_may_hold_the_base_beside_other_modules(pair):
    base, sft = pair
    before, anchor = _state(sft), _state(base)
    holder = nn.ModuleDict({"model": base, "critic": nn.Linear(2, 2)})
    rejuvenate(sft, holder, alpha=0.5)
    for name, parameter in sft.named_parameters():
        torch.testing.assert_close(parameter.detach(), (before[name] + anchor[name]) / 2)


def test_tied_embeddings_are_fused_once():
    base = tiny_llama(tie_word_embeddings=True)
    sft = sharpened(base)
    before, anchor = _state(sft), _state(base)
    rejuvenate(sft, base, alpha=0.5)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(sft.model.embed_tokens.weight, (before[name] + anchor[name]) / 2)
    assert sft.lm_head.weight is sft.model.embed_tokens.weight


def test_bfloat16_is_reset_bit_for_bit():
    base = tiny_llama(dtype=torch.bfloat16)
    sft = sharpened(base)
    options = {"alpha": 1.0, "reset": Reset(fraction=1.0, quantity="target_logit")}
    report = rejuvenate(sft, base, calibration(base), **options)
    anchor = _state(base)
    groups = {g.parameter for g in find_decoder(sft).groups}
    assert report.neurons_reset == report.neurons_total
    assert all(torch.equal(p, anchor[n]) for n, p in sft.named_parameters() if n in groups)


@pytest.mark.parametrize("quantity", ["entropy_gradient", "target_logit"])
def test_the_report_is_a_table_and_a_file(pair, tmp_path, quantity):
    base, sft = pair
    report = rejuvenate(sft, base, calibration(base), alpha=0.4, reset=Reset(fraction=0.1, quantity=quantity))
    text = str(report)
    assert "alpha            0.400" in text
    assert f"{report.neurons_reset} of {report.neurons_total}" in text
    assert report.attribution is not None
    if quantity == "target_logit":
        assert report.attribution.reconstruction_error < 1e-5
    else:
        assert report.attribution.reconstruction_error is None
    assert ("reconstruction" in text) == (quantity == "target_logit")
    report.save(tmp_path / "report.json")
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert loaded == json.loads(json.dumps(report.to_dict()))
    assert sum(g["reset"] for g in loaded["neurons"]) == report.neurons_reset == loaded["neurons_reset"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_alpha_for_each_pattern(pair):
    base, sft = pair
    before, anchor = _state(sft), _state(base)
    report = rejuvenate(sft, base, alpha={"*.mlp.*": 0.25, "model.layers.1.*": 0.5, "*": 1.0})
    for name, parameter in sft.named_parameters():
        alpha = 0.25 if ".mlp." in name else 0.5 if "layers.1." in name else 1.0
        torch.testing.assert_close(parameter.detach(), alpha * before[name] + (1 - alpha) * anchor[name])
    assert "0.250  *.mlp.*" in str(report)


def test_the_papers_union_is_the_brute_force_set(pair):
    """Union over positions of the top share of |contributions|, each position attributed by itself."""
    from lightning_rejuv.attribution.positions import Positions
    from lightning_rejuv.attribution.target_logit import attribute
    from lightning_rejuv.calibration.batches import as_batches

    base, sft = pair
    data = [batch(seed=0), greedy_batch(base)]
    paper = {"quantity": "target_logit", "budget": "union"}
    reset = Reset(0.05, positions="entropy_gap", positions_per_response=2, **paper)
    model = copy.deepcopy(sft)
    report = rejuvenate(model, base, data, alpha=1.0, reset=reset)
    decoder = find_decoder(sft)
    total = sum(g.count for g in decoder.groups)
    chosen: set[int] = set()
    positions = 0
    for checked in as_batches(data):
        entropies = []
        for m in (sft, base):
            with torch.no_grad():
                log_probs = m(**checked.inputs).logits[:, :-1].double().log_softmax(-1)
            entropies.append(-(log_probs.exp() * log_probs).sum(-1))
        gap = (entropies[0] - entropies[1]).abs().masked_fill(~checked.response, -1)
        for row in range(len(gap)):
            for time in gap[row].topk(min(2, int(checked.response[row].sum()))).indices.tolist():
                one = Positions(torch.tensor([row]), torch.tensor([time]), torch.tensor([0]), 0, 0)
                scores = torch.cat(attribute(sft, decoder, [checked], [one]).absolute)
                chosen |= set(scores.topk(round(0.05 * total)).indices.tolist())
                positions += 1
    assert report.attribution is not None
    assert report.attribution.positions == positions
    expected, start = [], 0
    for group in decoder.groups:
        expected.append(sum(start <= n < start + group.count for n in chosen))
        start += group.count
    assert [g.reset for g in report.neurons] == expected
    assert report.neurons_reset == len(chosen) > round(0.05 * total)


def test_the_entropy_gradient_predicts_what_a_reset_does_to_the_entropy(pair):
    """First order: moving one neuron a little toward the base changes the entropy by its score."""
    from lightning_rejuv.attribution import attribute_entropy
    from lightning_rejuv.attribution.positions import Positions
    from lightning_rejuv.calibration.batches import as_batches
    from lightning_rejuv.weights.edit import lerp_

    base = float64_llama()
    sft = sharpened(base)
    [data] = as_batches([greedy_batch(base)])
    chosen = Positions(torch.tensor([0, 1]), torch.tensor([4, 6]), torch.tensor([0, 0]), 0, 0)
    groups = find_decoder(sft).groups
    anchor = dict(base.named_parameters())
    result = attribute_entropy(sft, groups, [data], [chosen], lambda n: anchor[n].detach())

    @torch.no_grad()
    def entropy():
        log_probs = sft(**data.inputs).logits[chosen.row, chosen.time].log_softmax(-1)
        return -float((log_probs.exp() * log_probs).sum())

    start, step = entropy(), 1e-4
    for group, scores in zip(groups, result.total, strict=True):
        best = scores.abs().argmax().reshape(1)
        weight = sft.get_parameter(group.parameter)
        kept = weight.detach().clone()
        with torch.no_grad():
            lerp_(weight, anchor[group.parameter].detach(), step, dim=group.dim, index=group.place(best))
        change = (entropy() - start) / step
        with torch.no_grad():
            weight.copy_(kept)
        assert change == pytest.approx(float(scores[best]), rel=0.02, abs=2e-3)


def test_quantity_is_not_ignored(pair):
    base, sft = pair
    results = []
    for quantity in ("target_logit", "entropy_gradient"):
        model = copy.deepcopy(sft)
        options = {"alpha": 0.9, "reset": Reset(fraction=0.1, quantity=quantity, rank_by="signed")}
        results.append(rejuvenate(model, base, calibration(base), **options))
    assert [g.reset for g in results[0].neurons] != [g.reset for g in results[1].neurons]


def test_rounding_is_reported_and_stochastic_unless_told_otherwise():
    base = tiny_llama(dtype=torch.bfloat16)
    sft = shifted(base, 2e-4)  # a drift below half a unit in the last place of most weights
    before, anchor = _state(sft), _state(base)
    models = {}
    for rounding in ("nearest", "stochastic"):
        models[rounding] = copy.deepcopy(sft)
        told = {"rounding": rounding} if rounding == "nearest" else {}
        report = rejuvenate(models[rounding], base, alpha=0.3, **told)
        assert report.rounding == rounding
        shift = shift_of_alpha(before, anchor, _state(models[rounding]), 0.3)
        assert report.rounding_shift == pytest.approx(shift, rel=1e-3, abs=1e-5)
        if rounding == "nearest":
            assert shift < -0.1
            assert f"shifts alpha by {shift:+.3f}, toward the base: " in str(report)
        else:
            assert abs(shift) < 0.1  # of a few thousand weights
            assert f"shifts alpha by {shift:+.3f}" in str(report)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(models["nearest"].parameters(), models["stochastic"].parameters(), strict=True)
    )
    exact = {n: 0.3 * before[n].double() + 0.7 * anchor[n].double() for n in before}
    for name, parameter in models["nearest"].named_parameters():
        assert torch.equal(parameter, exact[name].to(torch.bfloat16))


def test_float32_reports_no_rounding(pair):
    base, sft = pair
    assert rejuvenate(sft, base, alpha=0.5).rounding_shift is None


def test_a_resized_vocabulary_is_fused_by_index_on_request_only():
    base = tiny_llama(vocab_size=23)
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(26)
    sft = shifted(larger)
    before, anchor = _state(sft), _state(base)
    with pytest.raises(ValueError, match=r"shape \(26, 16\) but got .*\(23, 16\).*resize_vocabulary=True"):
        rejuvenate(sft, base, alpha=0.5)
    rejuvenate(sft, base, alpha=0.5, resize_vocabulary=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = sft.get_parameter(name).detach()
        torch.testing.assert_close(table[:23], (before[name][:23] + anchor[name]) / 2)
        assert torch.equal(table[23:], before[name][23:])
    with pytest.raises(ValueError, match="to have shape"):  # only the tables may differ
        rejuvenate(tiny_llama(intermediate_size=14), base, resize_vocabulary=True, alpha=0.5)
