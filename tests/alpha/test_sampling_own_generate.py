"""The default sampler on a model that has nothing to do with transformers: what its ``generate`` has to do."""

from __future__ import annotations

import pytest
import torch

from tests.alpha.test_sampling import samples_of
from tests.conftest import tiny_llama


class Own(torch.nn.Module):
    """A language model that has nothing to do with transformers, with a ``generate`` of its own."""

    def __init__(self, returns, tokens=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(23, 23)
        self.returns, self.tokens = returns, tokens

    def forward(self, input_ids):
        return self.table(input_ids)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, **options):
        ids = input_ids
        for _ in range(self.tokens or max_new_tokens):
            ids = torch.cat([ids, torch.multinomial(self(ids)[:, -1].softmax(-1), 1)], 1)
        return self.returns(ids, input_ids.shape[1])


class Otherwise(Own):
    def generate(self, prompts, length):
        return prompts


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (Own(lambda ids, length: ids[:, length:]), r"returned, \(4, 36\), does not begin with them"),
        (Own(lambda ids, length: ids.tolist()), "it returned list"),
        (Own(lambda ids, length: (ids, None)), "it returned tuple"),
        (Own(lambda ids, length: ids[0]), r"it returned shape \(41,\) of torch.int64"),
        (Own(lambda ids, length: ids[:1]), r"it returned shape \(1, 41\)"),
        (Own(lambda ids, length: ids[:, :length]), r"it returned shape \(4, 5\)"),
        (Own(lambda ids, length: ids.float()), "of torch.float32"),
        (Otherwise(None), r"it takes other arguments \(missing"),
    ],
)
def test_a_generate_that_does_something_else_is_refused(model, got):
    expected = (
        rf"`generate` of {type(model).__name__} .* the prompts \(4, 5\) with new tokens .* but .*{got}.*"
    )
    with pytest.raises(ValueError, match=expected + "Pass `sampler=`"):
        samples_of(model, tiny_llama())


@pytest.mark.parametrize("tokens", [None, 3])
def test_a_generate_of_the_models_own_that_names_no_end(tokens):
    """What it ran out of tokens for is cut; where it stopped by itself nobody can tell."""
    found = samples_of(Own(lambda ids, length: ids, tokens), tiny_llama())
    for sample in found:
        if tokens is None:
            assert not sample["finished"].any()
        else:
            assert "finished" not in sample
            assert ((sample["labels"] != -100).sum(1) == tokens).all()
