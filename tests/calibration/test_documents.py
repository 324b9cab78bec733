"""Packed and padded batches are what they are made of: each document with its prompt, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.attribution import confidence
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.calibration.documents import documents_of
from tests.conftest import sharpened, tiny_llama

LENGTHS = (9, 5, 7, 6)


def documents():
    """Pairs of several lengths, one a batch, none padded."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in LENGTHS:
        ids = torch.randint(1, 23, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def packed(rows=2):
    """The same in fewer rows, by what only tells where they are; all rows are equally long."""
    ids, labels, number, positions = (torch.zeros(rows, 16, dtype=torch.int64) for _ in range(4))
    labels.fill_(-100)
    at = [0] * rows
    for count, document in enumerate(documents()):
        row, length = count % rows, document["input_ids"].shape[1]
        where = slice(at[row], at[row] + length)
        ids[row, where], labels[row, where] = document["input_ids"], document["labels"]
        number[row, where], positions[row, where] = count + 1, torch.arange(length)
        at[row] += length
    return ids, labels, number, positions


def _pairs(number):
    same = (number[:, :, None] == number[:, None]) & (number > 0)[:, None]
    return same.tril()


def forms():
    ids, labels, number, positions = packed()
    plain = {"input_ids": ids, "labels": labels}
    pairs = _pairs(number)
    added = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    wide = torch.cat([ids[0], ids[1]])[None], torch.cat([labels[0], labels[1]])[None]
    ends = torch.tensor([0, 9, 16, 21, 27, 32], dtype=torch.int32)
    return {
        "position_ids": {**plain, "position_ids": positions},
        "numbered mask": {**plain, "attention_mask": number},
        "seq_idx": {**plain, "seq_idx": number.int(), "attention_mask": (number > 0).long()},
        "mask of pairs": {**plain, "attention_mask": pairs[:, None]},
        "added mask of pairs": {**plain, "attention_mask": added[:, None]},
        "three dimensions": {**plain, "attention_mask": pairs.long()},
        "cumulative lengths": {"input_ids": wide[0], "labels": wide[1], "cu_seq_lens_q": ends},
    }


def rows_of(batches):
    return sorted(
        (ids[:n].tolist(), targets[: n - 1].tolist())
        for b in batches
        for ids, targets, n in zip(b.inputs["input_ids"], b.targets, b.lengths, strict=True)
    )


@pytest.mark.parametrize("form", forms())
def test_packed_rows_are_taken_apart(form):
    found = as_batches([forms()[form]])
    assert rows_of(found) == rows_of(as_batches(documents()))
    for batch in found:
        assert "position_ids" not in batch.inputs
        assert batch.inputs["input_ids"].numel() <= 32  # what the caller's batch holds


@pytest.mark.parametrize("form", ["position_ids", "mask of pairs"])
def test_packed_scores_are_those_of_each_document_alone(form):
    """The reference runs every document by itself, in float64 on the logits."""
    model = tiny_llama()
    found = torch.cat(
        [c.entropy[~c.entropy.isnan()] for c in (confidence(model, b) for b in as_batches([forms()[form]]))]
    )
    expected = []
    for document in documents():
        with torch.no_grad():
            log_probs = model(input_ids=document["input_ids"]).logits[0, 2:-1].double().log_softmax(-1)
        expected.append(-(log_probs.exp() * log_probs).sum(-1))
    torch.testing.assert_close(
        found.sort().values.double(), torch.cat(expected).sort().values, rtol=1e-4, atol=1e-5
    )


def test_figures_of_packed_and_unpacked_calibration_are_the_same():
    base = tiny_llama()
    sft = sharpened(base)
    plain, flat = (
        rejuvenate(
            copy.deepcopy(sft), base, data, alpha=0.5, reset=Reset(fraction=0.1, positions="entropy_gap")
        )
        for data in (documents(), [forms()["position_ids"]])
    )
    assert flat.neurons_reset == plain.neurons_reset
    assert [group.reset for group in flat.neurons] == [group.reset for group in plain.neurons]
    assert flat.comparison.entropy_before == pytest.approx(plain.comparison.entropy_before, rel=1e-5)
    assert flat.comparison.entropy_after == pytest.approx(plain.comparison.entropy_after, rel=1e-5)


def test_what_the_flattening_collator_of_transformers_makes():
    from transformers import DataCollatorWithFlattening

    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    examples = [{key: value[0].tolist() for key, value in d.items()} for d in documents()]
    assert rows_of(as_batches([collator(examples)])) == rows_of(as_batches(documents()))


def test_a_row_of_a_packed_dataset():
    """TRL packs rows of lists, and keeps the lengths of their documents beside them."""
    ids, labels = (torch.cat([d[key] for d in documents()], 1)[0].tolist() for key in ("input_ids", "labels"))
    row = {"input_ids": ids, "labels": labels, "seq_lengths": [d["input_ids"].shape[1] for d in documents()]}
    assert rows_of(as_batches([row])) == rows_of(as_batches(documents()))


def test_lengths_of_padded_rows_are_no_packing():
    (one, two), width = documents()[:2], 12
    pad = torch.nn.functional.pad
    data = {
        key: torch.cat([pad(d[key], (0, width - d[key].shape[1]), value=value) for d in (one, two)])
        for key, value in (("input_ids", 0), ("labels", -100))
    }
    data["seq_lengths"] = torch.tensor([d["input_ids"].shape[1] for d in (one, two)])
    assert rows_of(as_batches([data])) == rows_of(as_batches([one, two]))


@pytest.mark.parametrize("where", ["left", "right", "both", "within", "four dimensions"])
def test_padding_is_left_out_wherever_it_stands(where):
    expected, batches = [], []
    for document in documents():
        expected.append(document)
        before, after = {"left": (4, 0), "right": (0, 4), "both": (2, 3)}.get(where, (0, 0))
        ids, labels, mask = (
            torch.nn.functional.pad(tensor, (before, after), value=value)
            for tensor, value in (
                (document["input_ids"], 22),
                (document["labels"], -100),
                (torch.ones_like(document["input_ids"]), 0),
            )
        )
        if where == "within":  # as sampled: the prompt padded on its right
            ids, labels, mask = (
                torch.cat([t[:, :3], torch.full((1, 2), v), t[:, 3:]], dim=1)
                for t, v in ((ids, 22), (labels, -100), (mask, 0))
            )
        if where == "four dimensions":
            ids, labels = (
                torch.nn.functional.pad(t, (4, 0), value=v) for t, v in ((ids, 22), (labels, -100))
            )
            mask = _pairs(torch.nn.functional.pad(mask, (4, 0)))[:, None]
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    found = as_batches(batches)
    assert rows_of(found) == rows_of(as_batches(expected))
    assert all("attention_mask" not in batch.inputs for batch in found)


def test_a_document_without_response_is_left_out_of_a_packed_row_and_refused_alone():
    ids = torch.arange(1, 9)[None]
    labels = ids.clone()
    labels[:, :2] = -100
    labels[:, 5:] = -100
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    (found,) = as_batches([{"input_ids": ids, "labels": labels, "position_ids": positions}])
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    labels[:, :5] = -100
    with pytest.raises(ValueError, match=r"rows \[0\] have none"):
        as_batches([{"input_ids": ids, "labels": labels, "position_ids": positions}])


def test_documents_of_unlike_lengths_are_not_padded_beyond_what_was_given():
    """One long document and many short ones: in one padded batch they would be ten times as many tokens."""
    lengths = [40, *[4] * 20]
    ids = torch.randint(1, 23, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    found = as_batches([{"input_ids": ids, "labels": labels, "position_ids": positions}])
    assert sum(len(b.response) for b in found) == 21
    assert max(b.inputs["input_ids"].numel() for b in found) <= sum(lengths)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7]])}, "have a gap"),
        (
            {"position_ids": torch.zeros(1, 5).long()},
            r"`position_ids` of calibration batch 0 to have shape \(1, 6\)",
        ),
        ({"position_ids": torch.arange(18).view(3, 1, 6)}, "one number for each token of a text"),
        ({"attention_mask": torch.full((1, 6), 0.5)}, "values such as 0.5"),
        ({"attention_mask": torch.full((1, 6), -1)}, "values such as -1"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "see all before it in its document"),
        ({"attention_mask": torch.ones(1, 2, 6, 6)}, r"shape \(1, 1, 6, 6\)"),
        ({"attention_mask": {"full_attention": torch.ones(1, 6)}}, "`attention_mask` .* but got dict"),
        ({"attention_mask": torch.ones(6)}, r"but got \(6,\)"),
        ({"cu_seqlens": torch.tensor([0, 4, 2])}, "add up from 0 to at most 6"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "add up from 0 to at most 6"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(extra, message):
    ids = torch.arange(1, 7)[None]
    labels = ids.masked_fill(ids < 3, -100)
    with pytest.raises(ValueError, match=message):
        as_batches([{"input_ids": ids, "labels": labels, **extra}])


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 6, -1])}, [[0, 1, 2], [3, 4, 5]]),
        ({"cu_seqlens": torch.tensor([0, 3, 6, -1, -1])}, [[0, 1, 2], [3, 4, 5]]),
        ({"position_ids": torch.tensor([[0, 0, 1, 0, 0, 0]])}, [[0], [1, 2], [3], [4], [5]]),
    ],
)
def test_lengths_that_are_filled_up_and_documents_of_one_token(extra, expected):
    found = documents_of(extra, torch.arange(1, 7)[None], extra.get("position_ids"), "the batch")
    assert [(row, tokens.tolist()) for row, tokens in found] == [(0, tokens) for tokens in expected]
