"""The default sampler: the model's own distribution, whatever its settings say, within its context and the memory."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rejuv import Anchor, rejuvenate
from lightning_rejuv.alpha.sampling import _parts, sample_with_generate
from lightning_rejuv.calibration.batches import as_batches
from tests.conftest import greedy_batch, sharpened, tiny_llama

# For every field of a generation_config but the end-of-sequence and padding tokens a value that would be felt.
SETTINGS = {
    "begin_suppress_tokens": list(range(1, 20)),
    "bad_words_ids": [[token] for token in range(1, 15)],
    "bos_token_id": 3,
    "cache_implementation": "static",
    "decoder_start_token_id": 3,
    "diversity_penalty": 1.0,
    "do_sample": False,
    "dola_layers": "low",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "exponential_decay_length_penalty": (1, 3.0),
    "force_words_ids": [[5]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "guidance_scale": 3.0,
    "length_penalty": 2.0,
    "max_cache_len": 2,
    "max_length": 4,
    "max_new_tokens": 1,
    "max_time": 0.0,
    "min_length": 30,
    "min_new_tokens": 6,
    "min_p": 0.5,
    "no_repeat_ngram_size": 1,
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 3.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[5], 9.0]],
    "stop_strings": ["x"],
    "suppress_tokens": list(range(1, 20)),
    "temperature": 0.1,
    "token_healing": True,
    "top_h": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "typical_p": 0.1,
    "use_cache": False,
    "watermarking_config": {"bias": 9.0},
    "of_a_later_release": 1,
}


def data(base):
    """Prompts of three and of five tokens."""
    batches = [greedy_batch(base, rows=4, length=9), greedy_batch(base, rows=4, length=12, seed=1)]
    batches[0]["labels"][:, :5] = -100
    return batches


def samples_of(model, base, seed=0):
    return sample_with_generate(as_batches(data(base)), seed)(model)


def same(found, expected):
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def plain():
    base = tiny_llama(eos_token_id=[7, 9], pad_token_id=0)
    return base, samples_of(base, base)


def test_what_the_base_ends_with_ends_its_samples_too(plain):
    base, expected = plain
    model = copy.deepcopy(base)
    model.generation_config.eos_token_id = 7
    before = copy.deepcopy(model.generation_config.__dict__)
    found = sample_with_generate(as_batches(data(base)), 0, more_ends=[9, 7, -1, 10**6])(model)
    assert same(found, expected)
    assert not same(samples_of(model, base), expected)
    assert model.generation_config.__dict__ == before


@pytest.mark.parametrize("padding", [0, None, 10**6])
def test_ends_outside_the_vocabulary_end_nothing_and_pad_nothing(padding, plain):
    """As of a generation config that was copied from a model with another vocabulary."""
    base, expected = plain
    model = copy.deepcopy(base)
    model.generation_config.eos_token_id = [10**6, -1, 7, 9]
    model.generation_config.pad_token_id = padding
    found = samples_of(model, base)
    for batch, sample in zip(found, expected, strict=True):
        assert all(torch.equal(batch[k], sample[k]) for k in ("labels", "attention_mask", "finished"))
    model.generation_config.eos_token_id = 10**6
    size, ended = (
        base.config.vocab_size,
        sample_with_generate(as_batches(data(base)), 0, more_ends=[7, 9])(model),
    )
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(ended, expected, strict=True))
    assert all(int(batch["input_ids"].max()) < size for batch in [*found, *ended])


@pytest.mark.parametrize("kind", ["module", "directory", "config alone", "part", "state dict"])
def test_the_bases_own_end_ends_its_samples_and_no_rollout(kind, tmp_path):
    base = tiny_llama(eos_token_id=9, pad_token_id=0)
    model = sharpened(copy.deepcopy(base))
    model.generation_config.eos_token_id = [7]
    anchor, ends = base, [7, 9]
    if kind in ("directory", "config alone"):
        base.save_pretrained(tmp_path)
        anchor = tmp_path
        if kind == "config alone":
            (tmp_path / "generation_config.json").unlink()
    elif kind == "part":
        anchor = Anchor.open(torch.nn.ModuleDict({"ref": base}), "ref.")
    elif kind == "state dict":
        anchor, ends = base.state_dict(), [7]
    asked = []

    def spy(*arguments, generation_config, **options):
        asked.append(generation_config.eos_token_id)
        return type(model).generate(model, *arguments, generation_config=generation_config, **options)

    model.generate = spy
    calls = []

    def verifier(batch):
        calls.append(len(asked))
        return [True] * len(batch["input_ids"])

    rejuvenate(model, anchor, calibration=data(base), verifier=verifier)
    assert asked[: calls[0] // 2] == [ends] * (calls[0] // 2)
    assert asked[calls[0] // 2 :] == [[7]] * (len(asked) - calls[0] // 2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_the_model_bends_its_samples(plain, setting):
    base, expected = plain
    model = copy.deepcopy(base)
    setattr(model.generation_config, setting, SETTINGS[setting])
    before = copy.deepcopy(model.generation_config.__dict__)
    assert same(samples_of(model, base), expected)
    assert model.generation_config.__dict__ == before


def test_without_a_generation_config_the_models_own_configuration_says_where_a_sample_ends(plain):
    base, expected = plain
    model = copy.deepcopy(base)
    model.generation_config = None
    assert same(samples_of(model, base), expected)
    assert model.generation_config is None


def test_the_settings_are_all_that_there_are():
    from transformers import GenerationConfig

    of_no_matter = {
        *(
            "eos_token_id",
            "pad_token_id",
            "compile_config",
            "disable_compile",
            "transformers_version",
            "use_mtp",
        ),
        *("cache_config", "low_memory", "constraints", "continuous_batching_config"),
    }
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    helpers = {name for name in fields if "assistant" in name or "lookbehind" in name or "ngram" in name}
    assert fields - of_no_matter - helpers - {"speculation_type"} <= set(SETTINGS)


def test_the_alpha_is_the_same_whatever_the_settings_say(plain):
    base, _ = plain
    alphas = set()
    for setting in ("top_k", "repetition_penalty", "num_beams", "return_dict_in_generate", "eos_token_id"):
        model = sharpened(base)
        setattr(model.generation_config, setting, SETTINGS.get(setting, [7, 9]))
        alphas.add(rejuvenate(model, base, data(base)).alpha)
    assert len(alphas) == 1
    assert 0 < alphas.pop() < 1


def test_settings_on_the_models_configuration_are_left_alone(plain):
    """transformers refuses to generate with them where no generation_config is passed."""
    base, expected = plain
    model = copy.deepcopy(base)
    model.config.temperature = 0.1
    model.config.top_k = 1
    assert same(samples_of(model, base), expected)


def test_samples_follow_the_models_distribution(plain):
    base, _ = plain
    ids = torch.tensor([[5, 6, 7, 8]]).repeat(1500, 1)
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(4) < 3, -100)}
    model = copy.deepcopy(base)
    model.generation_config.update(top_k=2, temperature=0.5)
    found = sample_with_generate(as_batches([batch]), seed=0)(model)
    first = torch.cat([sample["input_ids"][:, 3] for sample in found])
    assert len(first) == 1500
    counts = torch.bincount(first, minlength=23).double() / 1500
    with torch.no_grad():
        expected = base(ids[:1, :3]).logits[0, -1].double().softmax(-1)
    assert (counts - expected).abs().max() < 4 * (0.25 / 1500) ** 0.5


def test_adapters_and_compiled_models_sample_alike(plain):
    from peft import LoraConfig, get_peft_model

    base, expected = plain
    for wrap in (
        lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["q_proj"])),  # does nothing yet
        lambda m: torch.compile(m, backend="eager"),
    ):
        model = copy.deepcopy(base)
        model.generation_config.update(top_k=1, return_dict_in_generate=True)
        wrapped = wrap(model)
        assert same(samples_of(wrapped, base), expected)
        assert model.generation_config.top_k == wrapped.generation_config.top_k == 1


@pytest.mark.parametrize(
    ("ends", "padding"), [(7, 7), (7, None), ([7, 9], 5), (None, None), (None, 3), (7, 23), ([9], -1)]
)
def test_a_response_ends_with_its_first_end_token_whatever_pads_it(ends, padding):
    base = tiny_llama()
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = ends, padding
    stops = [] if ends is None else [ends] if isinstance(ends, int) else ends
    ragged = greedy_batch(base, rows=40, length=13)
    found = sample_with_generate(as_batches([ragged]), seed=0)(base)
    lengths, finished = [], []
    for sample in found:
        for ids, labels, mask in zip(
            *(sample[k].tolist() for k in ("input_ids", "labels", "attention_mask")), strict=True
        ):
            last = next((i for i in range(3, len(ids)) if ids[i] in stops), len(ids) - 1)
            assert labels == [-100] * 3 + ids[3 : last + 1] + [-100] * (len(ids) - last - 1)
            assert mask == [1] * (last + 1) + [0] * (len(ids) - last - 1)
            lengths.append(last)
            finished.append(ids[last] in stops)
        (checked,) = as_batches([sample])
        assert checked.response.sum() == (sample["labels"] != -100).sum()
    assert len(lengths) == 40
    assert torch.cat([sample["finished"] for sample in found]).tolist() == finished
    if ends is None:
        assert not any(finished)  # all are cut
        assert set(lengths) == {3 + 4 * 10 - 1}  # four times the longest calibration response
    else:
        assert len(set(lengths)) > 1


def test_without_an_end_token_all_samples_are_cut_and_the_search_says_so():
    base = tiny_llama(eos_token_id=None)
    search = rejuvenate(sharpened(base), base, data(base)).search
    assert (search.responses, search.unfinished) == (8, 8)
    assert search.doubts[0].startswith("8 of the base's 8 samples did not end")


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    tokens=st.integers(1, 40),
    shuffled=st.randoms(use_true_random=False),
)
def test_samples_are_taken_apart_by_length(lengths, tokens, shuffled):
    """Every row is in one part, whole, beside rows that fit with it into so many tokens."""
    shuffled.shuffle(lengths)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    ids = (torch.arange(9) + 100 * torch.arange(1, len(lengths) + 1)[:, None]) * mask
    parts = _parts({"input_ids": ids, "attention_mask": mask, "finished": ids[:, 0] % 200 == 0}, tokens)
    rows = {}
    for part in parts:
        width = part["input_ids"].shape[1]
        assert part["attention_mask"].sum(1).max() == width
        assert len(part["finished"]) == 1 or part["input_ids"].numel() <= tokens
        for row, own, finished in zip(
            *(part[k] for k in ("input_ids", "attention_mask", "finished")), strict=True
        ):
            number = int(row[0]) // 100 - 1
            assert number not in rows
            rows[number] = row[own.bool()].tolist()
            assert bool(finished) == (number % 2 == 1)
    assert rows == {number: ids[number, :length].tolist() for number, length in enumerate(lengths)}
    # Rows of one length are not torn apart more often than they have to be.
    assert len(parts) <= sum(-(-lengths.count(n) // max(1, tokens // n)) for n in set(lengths))
