"""Supervised training: what a step descends, and which rungs are handed over."""

from __future__ import annotations

import copy

import pytest
import torch

from studies.real.master import BETAS, fast_dtype
from studies.real.recipes import Part, Texts
from studies.real.sft import SupervisedFineTuning
from studies.real.texts import batches, demonstrations
from studies.real.training import fit
from tests.studies.real import made_up


@pytest.fixture
def pairs(monkeypatch):
    from studies.real import texts

    monkeypatch.setattr(texts, "SPLITS", made_up.SPLITS)
    parts = (Part("sum2", "terse", 5), Part("sum3", "worked", 3))
    return demonstrations(made_up.tokenizer(), parts, "demonstrations", 7)


def test_one_epoch_is_adamw_on_the_loss_of_transformers(pairs):
    """The whole set in one batch: no order matters. The loss is the one that transformers computes from labels."""
    model = made_up.llama()
    reference = copy.deepcopy(model)
    module = SupervisedFineTuning(model, pairs, Texts((), 1e-3, 8, (2,)), torch.float32, 0)
    losses = fit(module, 2, "cpu")["loss"]
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=BETAS, weight_decay=0.0)
    (batch,) = batches(pairs, made_up.END)
    for loss in losses:
        expected = reference(**batch).loss
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


class Watched(SupervisedFineTuning):
    """Notes which pairs a step sees."""

    def training_step(self, batch, batch_idx):
        numbers = {id(pair): number for number, pair in enumerate(self.pairs)}
        self.seen = [*getattr(self, "seen", []), *(numbers[id(pair)] for pair in batch)]
        return super().training_step(batch, batch_idx)


def test_rungs_are_handed_over_after_their_epochs_in_another_order_each(pairs):
    module = Watched(made_up.llama(), pairs, Texts((), 1e-3, 4, (1, 3)), torch.float32, 0)
    norms = {}
    module.after_epoch = lambda epoch: norms.update({epoch: module.master.lm_head.weight.norm().item()})
    fit(module, 3, "cpu")
    assert list(norms) == [1, 3]
    assert norms[1] != norms[3]
    epochs = [module.seen[first : first + 8] for first in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_hold_every_pair_once_with_labels_on_its_response(pairs):
    made = batches(pairs, made_up.END, rows=3)
    assert [len(batch["input_ids"]) for batch in made] == [3, 3, 2]
    found = []
    for batch in made:
        for ids, labels, mask in zip(*batch.values(), strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert set(ids[length:].tolist()) <= {made_up.END}
            response = labels[labels != -100]
            assert torch.equal(ids[length - len(response) : length], response)
            found.append((ids[: length - len(response)].tolist(), response.tolist()))
    assert sorted(found) == sorted((pair.prompt, pair.response) for pair in pairs)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_only_with_units_for_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_dtype("cpu") == dtype


def test_a_torch_that_cannot_tell_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_dtype("cpu") == torch.float32
