"""What calibration data are taken for, and what is refused or said aloud about them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_rejuv import PlasticityMonitor, RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.attribution import attribute_loss, confidence
from lightning_rejuv.calibration import bounded as bounds
from lightning_rejuv.calibration.batches import as_batches
from lightning_rejuv.calibration.bounded import MAX_STREAMED
from lightning_rejuv.neurons import output_rows
from tests.callbacks.modules import Module, fit
from tests.conftest import batch, greedy_batch, sharpened, tiny_llama


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_integers_of_any_width_are_the_same_data(dtype):
    data = batch()
    narrow = {k: v.to(dtype) for k, v in data.items() if k != "labels"}
    narrow["labels"] = data["labels"].to(dtype if dtype != torch.uint8 else torch.int16)
    (expected,), (found,) = as_batches([data]), as_batches([narrow])
    assert found.targets.dtype == found.inputs["input_ids"].dtype == torch.int64
    assert torch.equal(found.targets, expected.targets)
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
    model = tiny_llama()
    assert torch.equal(
        confidence(model, found).log_prob.nansum(), confidence(model, expected).log_prob.nansum()
    )


@pytest.mark.parametrize("key", ["input_ids", "labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_tokens_that_are_no_integers_are_refused(key, dtype):
    data = batch()
    data[key] = data[key].to(dtype)
    with pytest.raises(TypeError, match=f"`{key}` of calibration batch 0 to be integers but got {dtype}"):
        as_batches([data])


def _shifted(data):
    return {"input_ids": data["input_ids"][:, :-1], "labels": data["labels"][:, 1:]}


def _shifted_and_filled(data):
    """As nanoGPT does: the last label, which there is no token for, is masked."""
    labels = torch.cat([data["labels"][:, 1:], torch.full_like(data["labels"][:, :1], -100)], dim=1)
    return {"input_ids": data["input_ids"], "labels": labels}


def _ignored_otherwise(data):
    return {**data, "labels": data["labels"].masked_fill(data["labels"] == -100, -1)}


def _one_replaced(data):
    labels = data["labels"].clone()
    labels[1, 5] = (labels[1, 5] + 1) % 23
    return {**data, "labels": labels}


@pytest.mark.parametrize("change", [_shifted, _shifted_and_filled, _ignored_otherwise, _one_replaced])
def test_labels_that_are_not_the_tokens_at_their_positions_are_refused(change):
    base = tiny_llama()
    sft = sharpened(base)
    before = {name: p.clone() for name, p in sft.named_parameters()}
    with pytest.raises(
        ValueError, match=r"labels of calibration batch 1 .* row \d has label .* shifted back by one"
    ):
        rejuvenate(sft, base, [greedy_batch(base), change(greedy_batch(base, seed=1))])
    assert all(torch.equal(p, before[name]) for name, p in sft.named_parameters())


def test_the_refusal_names_row_position_and_both_tokens():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 7, 8], [-100, -100, 7, 9]])
    with pytest.raises(ValueError, match="row 1 has label 9 at position 3, where the token is 8"):
        as_batches([{"input_ids": ids, "labels": labels}])


def test_labels_that_cover_every_prompt_are_warned_of_once():
    ids = torch.randint(1, 23, (3, 6))
    with pytest.warns(UserWarning, match="No prompt token of the probe data is masked") as caught:
        as_batches([{"input_ids": ids, "labels": ids}] * 3, "probe")
    assert len(caught) == 1


@pytest.mark.parametrize("masked", ["one row", "a prompt of one token"])
def test_masked_prompts_are_not_warned_of(masked):
    ids = torch.randint(1, 23, (3, 6))
    labels = ids.clone()
    labels[(slice(None), 0) if masked == "a prompt of one token" else (1, slice(0, 2))] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_batches([{"input_ids": ids, "labels": labels}])


@pytest.mark.parametrize("masked", [1, 2])
def test_in_packed_rows_the_first_token_of_a_document_is_no_prompt(masked):
    """Collators mask it, so that the document before does not predict it, whatever the labels cover."""
    ids = torch.randint(1, 23, (1, 8))
    labels = ids.clone()
    labels[0, :masked] = labels[0, 4 : 4 + masked] = -100
    packed = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(8).view(1, 8) % 4}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        as_batches([packed])
    assert ["No prompt token" in str(w.message) for w in caught] == [True] * (masked == 1)


def _lists(data):
    return {key: value.tolist() for key, value in data.items()}


FORMS = {
    "lists": lambda data: [_lists(data)],
    "arrays": lambda data: [{key: value.numpy() for key, value in data.items()}],
    "rows of lists": lambda data: [_lists({k: v[row] for k, v in data.items()}) for row in range(3)],
    "rows of tensors": lambda data: [{k: v[row] for k, v in data.items()} for row in range(3)],
    "rows of 16 bits": lambda data: [
        {k: v[row].short().numpy() for k, v in data.items()} for row in range(3)
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_arrays_and_single_rows_are_the_same_data(form):
    data = batch()
    (expected,) = as_batches([data])
    found = as_batches(FORMS[form](data))
    lengths = [int(n) for b in found for n in b.lengths]
    assert lengths == expected.lengths.tolist()
    rows = [
        (ids, targets, r)
        for b in found
        for ids, targets, r in zip(b.inputs["input_ids"], b.targets, b.response, strict=True)
    ]
    for number, (ids, targets, response) in enumerate(rows):
        n = lengths[number]
        assert torch.equal(ids[:n], expected.inputs["input_ids"][number, :n])
        assert torch.equal(targets[: n - 1], expected.targets[number, : n - 1])
        assert torch.equal(response[: n - 1], expected.response[number, : n - 1])


def test_rows_of_a_dataset():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = batch()
    rows = datasets.Dataset.from_dict({**_lists(data), "prompt": ["a", "b", "c"]})
    for form in (rows, rows.with_format("torch"), rows.with_format("numpy")):
        assert [b.lengths.tolist() for b in as_batches(form)] == [[7], [9], [9]]


@pytest.mark.parametrize("key", ["input_ids", "labels", "attention_mask", "seq_lengths"])
def test_lists_that_are_no_tensor_are_refused_by_name(key):
    data = _lists(batch())
    ragged = {**data, key: [[1, 2, 3], [1, 2], [1]]}
    with pytest.raises(ValueError, match=f"Expected '{key}' of calibration batch 0 to be a tensor, or lists"):
        as_batches([ragged])


def test_lists_that_were_collated_by_time_are_refused():
    data = [_lists({k: v[row] for k, v in batch().items()}) for row in range(3)]
    with pytest.raises(ValueError, match="'input_ids' of calibration batch 0 .* but got a list of tensors"):
        as_batches(torch.utils.data.DataLoader(data, batch_size=3))


@pytest.mark.parametrize(
    ("data", "got"), [(batch(), "one dict. Put it into a list."), ("data.jsonl", "str."), (3, "int.")]
)
def test_what_is_no_iterable_of_batches_is_refused(data, got):
    base = tiny_llama()
    message = f"data to be an iterable of batches but got {got}"
    with pytest.raises(TypeError, match=f"Expected the calibration {message}"):
        rejuvenate(sharpened(base), base, data)
    with pytest.raises(TypeError, match=f"Expected the calibration {message}"):
        rejuvenate(
            sharpened(base), base, data, alpha=0.5, reset=Reset(fraction=0.1), loss=lambda m, b: m(**b).loss
        )
    with pytest.raises(TypeError, match=f"Expected the sampled {message}"):
        rejuvenate(sharpened(base), base, [greedy_batch(base)], sampler=lambda _model: data)


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.5, "reset": Reset(fraction=0.1), "loss": lambda m, b: m(**b).loss}],
    ids=["", "loss"],
)
def test_reading_a_loader_leaves_the_random_state(options):
    """A DataLoader draws its order, and the seed of its workers, from the global random state."""
    base = tiny_llama()
    loader = torch.utils.data.DataLoader(
        [greedy_batch(base, seed=s) for s in range(3)], batch_size=None, shuffle=True
    )
    before = torch.get_rng_state()
    first, second = (rejuvenate(sharpened(base), base, loader, **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.drift_after == second.drift_after


def test_labels_of_padding_do_not_count_and_are_warned_of():
    data = batch()  # the first row has two tokens of padding
    covered = {**data, "labels": data["input_ids"].masked_fill(torch.arange(9) < 2, -100)}
    with pytest.warns(UserWarning, match="labels of calibration batch 0 cover padding"):
        (found,) = as_batches([covered])
    assert found.response.sum(1).tolist() == [5, 7, 7]


def test_what_follows_a_response_is_left_out():
    """Padded to a fixed width without a mask: the model is not run on it, nor does it count as too long."""
    data = batch()
    wide = {
        k: torch.nn.functional.pad(data[k], (0, 50), value=v) for k, v in (("input_ids", 0), ("labels", -100))
    }
    (found,) = as_batches([wide])
    assert found.inputs["input_ids"].shape == (3, 9)
    assert found.lengths.tolist() == [7, 9, 9]


class Endless:
    """A stream that ends the test, not the process, where it is read without a bound."""

    def __init__(self, data, most=2000):
        self.data, self.read, self.most = data, 0, most

    def __iter__(self):
        while self.read < self.most:
            self.read += 1
            yield self.data
        raise AssertionError("read without a bound")


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(Endless(self.data))


def test_a_stream_without_end_is_read_up_to_a_bound_that_is_said():
    stream = Endless(batch())
    with pytest.warns(
        UserWarning, match=r"more than \d+ responses; the first \d+ are used .* few dozen responses"
    ):
        found = as_batches(stream)
    assert MAX_STREAMED <= sum(len(b.response) for b in found) < MAX_STREAMED + 3
    assert stream.read == len(found) + 1


def test_a_data_loader_over_a_stream_has_no_length_either():
    with pytest.warns(UserWarning, match="few dozen"):
        as_batches(torch.utils.data.DataLoader(Stream(batch()), batch_size=None))


def test_a_list_is_used_much_further_than_a_stream_and_to_its_end(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(as_batches([batch()] * 60)) == 60
        assert len(as_batches(iter([batch()] * 42))) == 42  # 126 responses
        monkeypatch.setattr(bounds, "MAX_RESPONSES", 150)
        assert len(as_batches([batch()] * 50)) == 50  # exactly as many
    with pytest.warns(UserWarning, match="first 150 are used"):
        assert len(as_batches([batch()] * 51)) == 50


def test_samples_without_end_are_bounded(monkeypatch):
    monkeypatch.setattr("lightning_rejuv.alpha.line.MAX_RESPONSES", 9)
    base = tiny_llama()
    sft = sharpened(base)
    stream = Endless(greedy_batch(base))
    with pytest.warns(UserWarning, match="sampled data hold more than 9 responses"):
        rejuvenate(sft, base, [greedy_batch(sft)], sampler=lambda _: stream)
    assert stream.read == 4


def test_batches_of_another_loss_are_bounded():
    net, base = (nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    stream = Endless(torch.ones(1, 2))
    with pytest.warns(UserWarning, match="few dozen"):
        found = attribute_loss(net, output_rows(net), stream, lambda m, x: m(x).sum())
    assert found.positions == MAX_STREAMED
    options = {"alpha": 0.5, "reset": Reset(fraction=0.5), "loss": lambda m, x: m(x).sum()}
    with pytest.warns(UserWarning, match="few dozen"):
        rejuvenate(
            net, base, torch.utils.data.DataLoader(Stream(torch.ones(1, 2)), batch_size=None), **options
        )


def test_a_fit_with_a_stream_without_end_says_so_and_goes_on(tmp_path):
    base = tiny_llama()
    loader = torch.utils.data.DataLoader(Stream(greedy_batch(base, rows=16)), batch_size=None)
    callback = RejuvenationCallback(
        base, at_start=True, calibration=loader, alpha=0.5, reset=Reset(fraction=0.1)
    )
    with pytest.warns(UserWarning, match="calibration data hold more than 128 responses"):
        fit(Module(sharpened(base), base), callback, tmp_path=tmp_path, max_epochs=1)
    assert callback.report.alpha == 0.5
    with pytest.warns(UserWarning, match="probe data hold more than 128 responses"):
        PlasticityMonitor(probe=loader)
