"""Batches go through a model in parts: whole rows of at most so many tokens, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Refit, Reset, rejuvenate
from lightning_rejuv.alpha.sampling import sample_with_generate
from lightning_rejuv.attribution import attribute_entropy, confidence, mean_entropy
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.calibration import checks
from lightning_rejuv.calibration.batches import TOKENS_A_PASS, as_batches
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.neurons import find_decoder
from lightning_rejuv.progress import reporting
from tests.conftest import batch, float64_llama, greedy_batch, sharpened, tiny_llama


@pytest.fixture
def passes(monkeypatch):
    """Sets how many tokens a pass has."""
    return lambda tokens: monkeypatch.setattr(checks, "TOKENS_A_PASS", tokens)


def shapes(batches):
    return [tuple(part.inputs["input_ids"].shape) for part in batches]


def ragged(*lengths):
    """Rows of these lengths, padded on the left, as one batch; each prompt has two tokens."""
    width = max(lengths)
    ids = torch.arange(1, 1 + len(lengths) * width).view(-1, width) % 22 + 1
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    prompt = torch.stack([torch.arange(width) < width - length + 2 for length in lengths])
    return {"input_ids": ids, "labels": ids.masked_fill(prompt, -100), "attention_mask": mask}


def test_rows_stay_whole_in_order_and_padding_of_all_rows_is_cut_off():
    data = ragged(4, 3, 9, 2 + 1, 12)
    parts = as_batches([data], tokens=10)
    assert shapes(parts) == [(2, 4), (1, 9), (1, 3), (1, 12)]  # a row alone may be longer
    assert [part.rows for part in parts] == [(0, 1), (2,), (3,), (4,)]
    assert {part.where for part in parts} == {"calibration batch 0"}
    assert {part.whole for part in parts} == {(5, 60)}
    assert ["attention_mask" in part.inputs for part in parts] == [True, False, False, False]
    (whole,) = as_batches([data])
    assert whole.whole is None
    for part in parts:
        for number, row in enumerate(part.rows):
            length = int(part.lengths[number])
            assert length == int(whole.lengths[row])
            for name in ("targets", "response"):
                ours, theirs = getattr(part, name)[number], getattr(whole, name)[row]
                assert torch.equal(ours[: length - 1], theirs[: length - 1])


def test_a_pass_has_4096_tokens():
    rows = ragged(*[600] * 20)
    assert TOKENS_A_PASS == 4096
    assert shapes(batches_for(tiny_llama(max_position_embeddings=600), [rows])) == [(6, 600)] * 3 + [(2, 600)]


def test_a_part_says_what_the_whole_batch_says(passes):
    model, data = tiny_llama(), ragged(9, 4, 7, 12, 5, 6)
    (whole,) = batches_for(model, [data])
    expected = confidence(model, whole)
    passes(12)
    parts = batches_for(model, [data])
    assert len(parts) > 3
    found = [confidence(model, part) for part in parts]
    for name in ("entropy", "log_prob"):
        ours = torch.cat([getattr(c, name)[part.response] for c, part in zip(found, parts, strict=True)])
        torch.testing.assert_close(ours, getattr(expected, name)[whole.response], rtol=1e-5, atol=1e-6)
    assert mean_entropy(found) == pytest.approx(mean_entropy([expected]), rel=1e-6)


def test_positions_that_do_not_count_from_0_go_along(passes):
    passes(9)
    data = batch()
    data["position_ids"] = torch.arange(9)[None] + torch.tensor([[0], [3], [0]])
    parts = batches_for(tiny_llama(), [data])
    assert ["position_ids" in part.inputs for part in parts] == [False, True, False]
    assert parts[1].inputs["position_ids"].tolist() == [list(range(3, 12))]


def test_messages_name_the_callers_batch_and_row(passes):
    passes(9)
    data = [batch(), batch()]
    data[1]["input_ids"][2, 1] = 99  # of the prompt
    with pytest.raises(ValueError, match="tokens of calibration batch 1 to lie .* but got 99"):
        batches_for(tiny_llama(), data)
    with pytest.raises(ValueError, match="row 1 of calibration batch 1 has 9"):
        batches_for(tiny_llama(max_position_embeddings=8), [ragged(3, 3), ragged(3, 9, 9)])


@pytest.mark.parametrize("ranking", ["absolute", "total"])
def test_the_entropys_gradient_counts_a_batch_of_the_callers_once(ranking):
    """The absolute value is that of the sum over its rows, in however many parts they go through the model."""
    base = float64_llama()
    model, anchor = sharpened(base), dict(base.named_parameters())
    groups, found = find_decoder(model).groups, []
    for tokens in (1, 18, float("inf")):
        parts = as_batches([batch(), batch(seed=1)], tokens=tokens)
        chosen = [
            Positions(
                *(torch.tensor(column) for column in ([*range(len(p.rows))], [5] * len(p.rows), [0])), 0, 0
            )
            for p in parts
        ]
        result = attribute_entropy(model, groups, parts, chosen, lambda n: anchor[n].detach())
        assert result.positions == 6
        found.append(torch.cat(getattr(result, ranking)))
    for parts in found[:2]:
        torch.testing.assert_close(parts, found[2], rtol=1e-9, atol=1e-12)


def test_what_is_sampled_does_not_depend_on_it(passes):
    model, data = tiny_llama(), [greedy_batch(tiny_llama(), rows=6), ragged(5, 5, 9)]
    whole = sample_with_generate(batches_for(model, data), 0)(model)
    passes(9)
    parts = sample_with_generate(batches_for(model, data), 0)(model)
    for ours, theirs in zip(parts, whole, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


OPTIONS = {
    "entropy_gradient": {"reset": Reset(fraction=0.1)},
    "absolute": {"reset": Reset(fraction=0.1, rank_by="absolute", positions="entropy_gap")},
    "target_logit": {
        "reset": Reset(fraction=0.1, quantity="target_logit", positions="entropy_gap"),
        "alpha": 0.5,
    },
    "refit": {"refit": Refit(steps=2, batch_size=5)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_rejuvenation_is_the_same_and_no_pass_is_larger(options, passes):
    base = tiny_llama()
    data = [greedy_batch(base, rows=8, seed=seed) for seed in range(2)]
    models, reports = [], []
    for tokens in (4096, 20):
        passes(tokens)
        model, seen, told = sharpened(base, 0.05), [], []
        embedding = model.model.embed_tokens
        hook = embedding.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[0].shape))
        with reporting(lambda *step, told=told: told.append(step)):
            reports.append(rejuvenate(model, base, copy.deepcopy(data), **options))
        hook.remove()
        models.append(model)
        generated = [shape for shape in seen if shape[1] in (1, 3)]  # prompts, and tokens one by one
        most = max(tokens, *(shape[1] for shape in seen))  # one row at least
        assert all(shape.numel() <= most for shape in seen if shape not in generated)
        for name in {name for name, _, _ in told} & {
            "searching for alpha",
            "comparing with the base",
            "refitting",
        }:
            done = [(count, total) for of, count, total in told if of == name]
            assert [count for count, _ in done] == list(range(done[-1][1] + 1))
    assert reports[0].alpha == reports[1].alpha
    entropies = [report.comparison.entropy_after for report in reports]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
