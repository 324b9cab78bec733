from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.alpha import line
from lightning_rejuv.alpha.search import FIRST, GRID
from tests.conftest import greedy_batch, sharpened, tiny_llama


@pytest.fixture
def pair():
    base = tiny_llama()
    return base, sharpened(base)


@torch.no_grad()
def sample(model, rows=48, seed=4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 23, (rows, 8), generator=generator)
    for time in range(3, 8):
        logits = model(input_ids=ids[:, :time]).logits[:, -1]
        ids[:, time] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    labels = ids.clone()
    labels[:, :3] = -100
    return [{"input_ids": ids, "labels": labels}]


def nll(model, batch):
    with torch.no_grad():
        log_probs = model(input_ids=batch["input_ids"]).logits[:, 2:-1].double().log_softmax(-1)
    return -float(log_probs.gather(2, batch["input_ids"][:, 3:, None]).sum()) / len(log_probs)


def fused(pair, alpha):
    model = copy.deepcopy(pair[1])
    rejuvenate(model, pair[0], alpha=alpha)
    return model


def search_of(pair, **options):
    demonstrations = [greedy_batch(pair[1], rows=8)]
    model = copy.deepcopy(pair[1])
    options = {"sampler": sample, **options}
    report = rejuvenate(model, pair[0], demonstrations, alpha="auto", **options)
    assert report.alpha == report.search.alpha
    return report.search


def test_the_curve_is_of_the_demonstrations_and_of_what_the_base_sampled(pair):
    search = search_of(pair)
    [own], demonstrations = sample(pair[0]), greedy_batch(pair[1], rows=8)
    assert [point.alpha for point in search.curve] in (list(FIRST), list(GRID))
    for point in search.curve:
        model = fused(pair, point.alpha)
        assert point.demonstrations == pytest.approx(nll(model, demonstrations), abs=1e-4)
        assert point.base_samples == pytest.approx(nll(model, own), abs=1e-4)
    assert (search.responses, search.unfinished, search.right, search.judged) == (48, None, None, None)
    assert 0 < search.alpha < 1


@pytest.mark.parametrize("clear", [True, False])
def test_the_line_is_looked_at_closer_only_if_that_may_change_the_answer(pair, monkeypatch, clear):
    monkeypatch.setattr(line, "is_clear", lambda curve: clear)
    search = search_of(pair)
    assert [point.alpha for point in search.curve] == list(FIRST if clear else GRID)
    own = nll(pair[1], greedy_batch(pair[1], rows=8))
    assert search.curve[-1].demonstrations == pytest.approx(own, abs=1e-4)


def test_a_base_that_is_a_module_is_run_as_it_is_with_a_search_too(pair):
    """Its logits are capped, the model's are not: what the base says is the module's, whichever way alpha comes."""
    base, sft = pair
    base.lm_head.register_forward_hook(lambda _module, _args, logits: 0.5 * logits)
    data = [greedy_batch(sft, rows=8)]
    known = rejuvenate(copy.deepcopy(sft), base, data, alpha=0.4, reset=Reset(fraction=0.1))
    found = rejuvenate(copy.deepcopy(sft), base, data, sampler=sample, reset=Reset(fraction=0.1))
    assert found.comparison.entropy_base == pytest.approx(known.comparison.entropy_base, abs=1e-6)
    plain = rejuvenate(copy.deepcopy(sft), base.state_dict(), data, alpha=0.4, reset=Reset(fraction=0.1))
    assert abs(plain.comparison.entropy_base - known.comparison.entropy_base) > 0.01


def test_the_format_is_what_the_base_does_not_know(pair):
    """Not what the model at each alpha does not know itself: SFT has taught it to end with token 7."""
    base, sft = pair
    demonstrations = greedy_batch(base, rows=8)
    demonstrations["input_ids"][:, -1] = demonstrations["labels"][:, -1] = 7
    with torch.no_grad():
        last = sft.model(demonstrations["input_ids"][:, :-1]).last_hidden_state[:, -1]
        others = sft.lm_head(last).amax(1, keepdim=True)
        sft.lm_head.weight[7] = torch.linalg.lstsq(last, others + 2).solution[:, 0]
    search = rejuvenate(copy.deepcopy(sft), base, [demonstrations], sampler=sample).search
    expected = []
    for point in search.curve:
        with torch.no_grad():
            logits = fused(pair, point.alpha)(input_ids=demonstrations["input_ids"]).logits[:, -2].double()
        expected.append(float(logits.softmax(-1)[:, 7].mean()))
    assert expected[0] < 0.25 < 0.5 < expected[-1]
    assert [point.format for point in search.curve] == pytest.approx(expected, abs=1e-4)


def test_the_base_is_sampled_once_and_its_weights_are_read_for_it(pair):
    seen = []

    def sampler(model):
        seen.append(torch.equal(model.model.embed_tokens.weight, pair[0].model.embed_tokens.weight))
        return sample(model)

    search_of(pair, sampler=sampler)
    assert seen == [True]


def restless(model):
    """What code of the caller's may leave behind."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.set_grad_enabled(False)


def lists(model):
    found = sample(model)
    restless(model)
    return found


def generates(model):
    yield from sample(model)
    restless(model)


def is_closed(model):
    """Not read to its end, and closed where it is left."""
    try:
        yield from sample(model)
        yield {}
    finally:
        restless(model)


@pytest.mark.parametrize("sampler", [lists, generates, is_closed])
@pytest.mark.filterwarnings("ignore:The sampled data hold more than")
def test_a_sampler_that_leaves_the_model_in_training_spoils_nothing(sampler, monkeypatch):
    """Neither curve nor attribution nor what the caller finds afterwards: dropout of .5 would show."""
    monkeypatch.setattr("lightning_rejuv.alpha.line.MAX_RESPONSES", 48)
    base = tiny_llama(attention_dropout=0.5)
    sft = sharpened(base)

    found = []
    for one in (sample, sampler):
        model = copy.deepcopy(sft).train()
        model.model.layers[0].eval()
        model.lm_head.weight.requires_grad_(False)
        options = {"reset": Reset(fraction=0.1), "sampler": one}
        found.append(rejuvenate(model, base, [greedy_batch(sft, rows=8)], **options))
        assert torch.is_grad_enabled()
        assert [m.training for m in model.model.layers] == [False, True]
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert found[0].search == found[1].search
    assert found[0].comparison == found[1].comparison
    assert [group.reset for group in found[0].neurons] == [group.reset for group in found[1].neurons]


def test_a_verifier_that_leaves_the_model_in_training_spoils_nothing():
    base = tiny_llama(attention_dropout=0.5)
    sft = sharpened(base)
    found = []
    for leaves in (lambda model: None, restless):
        model = copy.deepcopy(sft)

        def verifier(batch, model=model, leaves=leaves):
            leaves(model)
            return batch["input_ids"][:, -1] % 2 == 0

        options = {"reset": Reset(fraction=0.1), "sampler": sample, "verifier": verifier}
        found.append(rejuvenate(model, base, [greedy_batch(sft, rows=8)], **options))
        assert torch.is_grad_enabled()
        assert all(p.requires_grad for p in model.parameters())
    assert found[0].comparison == found[1].comparison
    assert found[0].search == found[1].search


def test_unfinished_samples_are_counted_if_the_sampler_tells(pair):
    def sampler(model):
        [batch] = sample(model)
        return [{**batch, "finished": torch.arange(48) >= 7}]

    search = search_of(pair, sampler=sampler)
    assert search.unfinished == 7
    assert "7 of the base's 48 samples did not end" in search.doubts[0]


@pytest.mark.parametrize(
    "finished",
    [False, [False] * 3, None, "yes", torch.ones(48, 1), torch.full((48,), 0.5), [float("nan")] * 48],
)
def test_what_does_not_say_of_each_response_whether_it_ended(pair, finished):
    with pytest.raises(
        ValueError, match=r"`finished` of sampled batch 1 to be one bool for each of its 48 rows"
    ):
        search_of(
            pair,
            sampler=lambda m: [{**sample(m)[0], "finished": kind} for kind in ([True] * 48, finished)],
        )


def rows(batches):
    """As a dataset has them: without the first dimension."""
    return [{key: value[i] for key, value in b.items()} for b in batches for i in range(len(b["input_ids"]))]


def listed(batches):
    return [{key: value.tolist() for key, value in batch.items()} for batch in batches]


@pytest.mark.parametrize("form", [rows, lambda batches: listed(rows(batches)), listed])
def test_rows_of_a_dataset_are_one_response_each(pair, form, monkeypatch):
    """They were counted by their tokens: eight for each."""
    monkeypatch.setattr("lightning_rejuv.alpha.line.MAX_RESPONSES", 48)

    def sampler(model):
        [batch] = sample(model)
        return form([{**batch, "finished": torch.arange(48) >= 7}])

    asked = []
    search = search_of(
        pair,
        sampler=sampler,
        verifier=lambda b: asked.append(b) or [True] * (1 if form is not listed else 48),
    )
    assert (search.responses, search.unfinished, search.judged, search.right) == (48, 7, 48, 1.0)
    assert len(asked) == (1 if form is listed else 48)


def by_turns(*counts):
    """A sampler that returns so many responses the first time, and so many afterwards."""
    left = list(counts)
    return lambda model: sample(model, rows=left.pop(0) if len(left) > 1 else left[0])


@pytest.mark.parametrize(
    ("counts", "doubt"),
    [
        ((48, 1), "None of 1 rollout is right at alpha 0.40, which are too few to tell"),
        ((48, 31), "None of 31 rollouts is right at alpha 0.40, which are too few to tell"),
        ((8, 64), "None of 64 rollouts is right at alpha 0.40, nor at any up to 0.70"),
    ],
)
def test_rollouts_are_those_that_were_judged(pair, counts, doubt):
    """Not as many as the base sampled."""
    search = search_of(pair, sampler=by_turns(*counts), verifier=lambda b: [False] * len(b["input_ids"]))
    assert search.doubts[-1].startswith(doubt)
    assert (search.responses, search.judged, search.right) == (*counts, 0.0)
    assert search.found_nothing_right == (counts[1] >= 32)


def test_a_raise_is_told(pair):
    asked = []

    def verifier(batch):
        asked.append(batch)
        return torch.full((48,), len(asked) > 1)

    demonstrations, model = [greedy_batch(pair[1], rows=8)], copy.deepcopy(pair[1])
    report = rejuvenate(model, pair[0], demonstrations, sampler=sample, verifier=verifier)
    search = report.search
    assert (search.alpha, search.raised_from, search.right, search.judged) == (0.5, 0.4, 1.0, 48)
    assert report.alpha == 0.5
    found = report.to_dict()["search"]
    assert (found["raised_from"], found["judged"]) == (0.4, 48)
    assert "100% of 48 at this alpha are right" in str(report)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], r"Expected the sampler to return responses at alpha 0.4 too"),
        ([{"input_ids": torch.ones(40, 8).long()}], "sampled batch 0 to hold a tensor 'labels'"),
        (
            [{"input_ids": torch.full((40, 8), 99), "labels": torch.tensor([[-100, -100, *[99] * 6]] * 40)}],
            "vocabulary of 23 but got 99",
        ),
    ],
)
def test_what_is_sampled_at_alpha_is_checked_as_what_the_base_samples(pair, bad, message):
    turns = []

    def sampler(model):
        turns.append(model)
        return sample(model) if len(turns) == 1 else bad

    with pytest.raises(ValueError, match=message):
        search_of(pair, sampler=sampler, verifier=lambda b: [True] * 40)
    assert len(turns) == 2


def test_a_few_demonstrations_are_told(pair):
    search = search_of(pair, sampler=lambda m: sample(m, rows=3))
    assert search.doubts[0].startswith("Alpha goes by 8 demonstrations and 3 samples of the base")


def test_a_verifier_checks_responses_at_the_alpha_that_was_found(pair):
    seen = []

    def verifier(batch):
        seen.append(batch["input_ids"])
        return batch["input_ids"][:, -1] % 2 == 0

    search = search_of(pair, verifier=verifier)
    [expected] = sample(fused(pair, search.alpha))
    assert torch.equal(seen[0], expected["input_ids"])
    assert search.right == pytest.approx(float((expected["input_ids"][:, -1] % 2 == 0).float().mean()))


@pytest.mark.parametrize("answer", [lambda b: True, lambda b: torch.ones(7), lambda b: torch.ones(48, 8)])
def test_a_verifier_that_does_not_answer_for_each_row(pair, answer):
    with pytest.raises(ValueError, match="one bool for each of the 48 rows of sampled batch 0 but got shape"):
        search_of(pair, verifier=answer)


def test_a_list_does_as_an_answer(pair):
    assert search_of(pair, verifier=lambda b: [True] * len(b["input_ids"])).right == 1.0


def test_a_search_needs_demonstrations_even_with_a_sampler(pair):
    with pytest.raises(ValueError, match="Expected calibration data for `alpha='auto'` but got none"):
        rejuvenate(pair[1], pair[0], alpha="auto", sampler=sample)
