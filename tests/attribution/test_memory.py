"""What the passes over the calibration set hold does not grow with its batches, and is never all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_rejuv.attribution import attribute, attribute_entropy, compare
from lightning_rejuv.calibration import checks
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.neurons import find_decoder
from lightning_rejuv.weights.blend import Blend
from tests.conftest import sharpened, tiny_llama

VOCABULARY, TIME, RESPONSE, ROWS_A_PASS = 5000, 64, 8, 4


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor that is made has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def measured(rows, capped, monkeypatch):
    """The largest tensors of each step, with so many rows in one batch."""
    monkeypatch.setattr(checks, "TOKENS_A_PASS", ROWS_A_PASS * TIME)
    base = tiny_llama(vocab_size=VOCABULARY)
    model = sharpened(base)
    if capped:
        model.lm_head.register_forward_hook(lambda _m, _a, logits: 30 * (logits / 30).tanh())
    ids = torch.randint(1, VOCABULARY, (rows, TIME), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-RESPONSE] = -100
    batches = batches_for(model, [{"input_ids": ids, "labels": labels}])
    anchor, decoder, found = dict(base.named_parameters()), find_decoder(model), {}
    weights = dict(model.named_parameters())

    def step(name, function):
        with Largest() as largest:
            made = function()
        found[name] = largest.elements
        return made

    with evaluation_mode(model), Blend(weights, lambda name: anchor[name].detach()) as blend:
        comparison = step("compare", lambda: compare(model, blend, batches, "entropy_gap", 1))
        at = comparison.positions
        assert sum(map(len, at)) == rows
        step(
            "entropy",
            lambda: attribute_entropy(model, decoder.groups, batches, at, lambda n: anchor[n].detach()),
        )
        if not capped:  # of a head with a hook the target's logit is not linear
            step("target_logit", lambda: attribute(model, decoder, batches, at))
    return found


@pytest.mark.parametrize("capped", [False, True])
def test_no_tensor_grows_with_the_rows_of_a_batch_or_holds_all_logits(capped, monkeypatch):
    few, many = (measured(rows, capped, monkeypatch) for rows in (16, 32))
    assert few == many
    scored, weight = ROWS_A_PASS * RESPONSE * VOCABULARY, VOCABULARY * 16
    assert weight < scored < ROWS_A_PASS * TIME * VOCABULARY
    assert many.pop("compare") == scored
    assert set(many.values()) == {weight}  # of the chosen positions there are fewer logits
