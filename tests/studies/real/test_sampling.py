"""The sampler against `generate`, and against logits of sequences that are run one by one without a cache."""

from __future__ import annotations

import pytest
import torch

from studies.real.sampling import draw, sample
from tests.studies.real.made_up import END, llama

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31]]


@pytest.fixture(scope="module")
def model():
    return llama(seed=3)


@torch.no_grad()
def _distribution(model, prompt: list[int], response: list[int], temperature: float = 1.0):
    """Log-probabilities of every next token of a response, ``[T, V]``, from one plain forward pass."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def _ends_early(model, bias: float):
    """The same model, which likes to end: its rows leave the batch at different times."""
    other = llama(seed=3)
    with torch.no_grad():
        other.model.embed_tokens.weight[END] *= bias
    return other


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_greedy_is_what_generate_gives(model, rows):
    greedy = sample(model, PROMPTS, 1, 9, end=END, greedy=True, rows=rows)
    for prompt, tokens in zip(PROMPTS, greedy.tokens, strict=True):
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=9,
            eos_token_id=END,
        )[0, len(prompt) :].tolist()
        assert tokens == made


@pytest.mark.parametrize(("bias", "temperature"), [(1.0, 1.0), (6.0, 1.0), (6.0, 1.7)])
def test_log_probabilities_and_entropies_are_those_of_a_plain_forward_pass(bias, temperature):
    model = _ends_early(None, bias)
    generator = torch.Generator().manual_seed(1)
    made = sample(model, PROMPTS, 5, 12, end=END, generator=generator, temperature=temperature, rows=12)
    assert len(made.tokens) == 20
    if bias > 1:
        lengths = {len(tokens) for tokens in made.tokens}
        assert min(lengths) < 6 < max(lengths)  # rows left one after the other
    for row, tokens in enumerate(made.tokens):
        assert END not in tokens[:-1]
        assert tokens[-1] == END or len(tokens) == 12
        expected = _distribution(model, PROMPTS[row // 5], tokens, temperature)
        picked = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(made.log_probs[row]), picked, rtol=1e-4, atol=1e-4)
        entropies = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(torch.tensor(made.entropies[row]), entropies, rtol=1e-4, atol=1e-4)
    flat = [value for row in made.entropies for value in row]
    assert made.token_entropy == pytest.approx(sum(flat) / len(flat))
    assert made.token_count == len(flat)


def test_first_tokens_follow_the_distribution(model):
    made = sample(model, PROMPTS[:1], 4000, 1, end=END, generator=torch.Generator().manual_seed(2), rows=4000)
    counts = torch.bincount(torch.tensor(made.tokens)[:, 0], minlength=model.config.vocab_size)
    expected = _distribution(model, PROMPTS[0], [0]).exp()[0]
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() <= 5 * error + 1e-9).all()


def test_a_draw_never_takes_what_has_no_probability():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).repeat(2000, 1)
    drawn = draw(probabilities, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}
    assert abs(int((drawn == 1).sum()) - 1000) < 150


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_left_as_they_were(training):
    model = llama().train(training)
    sample(model, PROMPTS, 2, 3, end=END)
    assert model.training is training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
