"""Calibration data that a model cannot read are refused by name before anything is done."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_rejuv import RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.calibration.checks import batches_for, context_length
from lightning_rejuv.cli.main import main
from tests.alpha.test_sampling_batches import gpt2
from tests.callbacks.modules import Module, fit
from tests.checkpoints.directories import edit_config, known_pair
from tests.conftest import batch, greedy_batch, sharpened, shifted, tiny_llama


def pairs(length, rows=2):
    ids = torch.randint(1, 21, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < 3, -100)}


def test_a_pair_beyond_the_context_is_refused_by_number():
    base = gpt2(16)
    sft = sharpened(base)
    before = {name: p.clone() for name, p in sft.named_parameters()}
    message = "at most 16 tokens, the context of GPT2LMHeadModel, but row 0 of calibration batch 1 has 17"
    with pytest.raises(ValueError, match=message):
        rejuvenate(sft, base, [pairs(9), pairs(17)])
    assert all(torch.equal(p, before[name]) for name, p in sft.named_parameters())
    batches_for(sft, [pairs(16)])


def test_padding_beyond_the_context_is_not_what_counts():
    """Neither does a packed row: each of its documents fits."""
    base = gpt2(16)
    wide = {k: nn.functional.pad(v, (0, 20), value=-100 if k == "labels" else 0) for k, v in pairs(9).items()}
    flat = {k: v.reshape(1, -1) for k, v in pairs(9, rows=4).items()}
    flat["position_ids"] = torch.arange(9).repeat(4)[None]
    found = rejuvenate(
        sharpened(base), base, [wide, flat], reset=Reset(fraction=0.1, positions="entropy_gap"), alpha=0.5
    )
    assert found.comparison.entropy_after > 0


def test_the_callback_refuses_it_at_the_start(tmp_path):
    base = tiny_llama(max_position_embeddings=16)
    module = Module(sharpened(base), base)
    callback = RejuvenationCallback(base, at_epoch=1, calibration=[pairs(20)])
    with pytest.raises(ValueError, match="at most 16 tokens"):
        fit(module, callback, tmp_path=tmp_path)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("command", ["rejuvenate", "diagnose"])
def test_the_commands_refuse_it_and_write_nothing(tmp_path, capsys, command):
    base, sft, calibration = known_pair(tmp_path)
    for path in (base, sft):
        edit_config(path, max_position_embeddings=4)
    out = ["--out", str(tmp_path / "out")] if command == "rejuvenate" else []
    given = ["--base", str(base), "--sft", str(sft), "--calibration", str(calibration)]
    assert main([command, *given, *out]) == 3
    told = capsys.readouterr().err
    assert "lightning-rejuv: error: Expected line 1 of " in told
    assert "to fit into the model's 4 positions but it has 6 tokens" in told
    assert not (tmp_path / "out").exists()


def _model(**config):
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(**config)
    return model


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (_model(), None),
        (_model(max_position_embeddings=None), None),
        (_model(max_position_embeddings=-1), None),
        (_model(n_positions=12), 12),
        (_model(max_seq_len=12), 12),
        (_model(block_size=12), 12),
        (
            _model(
                max_position_embeddings=100,
                rope_scaling={"factor": 4.0, "original_max_position_embeddings": 100},
            ),
            400,
        ),
        (
            _model(
                max_position_embeddings=400,
                rope_scaling={"factor": 4.0, "original_max_position_embeddings": 100},
            ),
            400,
        ),
        (
            _model(
                max_position_embeddings=100,
                rope_parameters={"full_attention": {"factor": 2.0}, "sliding": {}},
            ),
            200,
        ),
        (_model(max_position_embeddings=100, rope_scaling={"rope_type": "default"}), 100),
    ],
)
def test_the_context_is_what_the_configuration_states(model, limit):
    assert context_length(model) == limit


def test_the_context_of_real_configurations():
    from peft import LoraConfig, get_peft_model
    from transformers import RobertaConfig, RobertaForCausalLM

    base = gpt2(16)
    assert context_length(base) == 16
    assert context_length(torch.compile(base)) == 16
    assert context_length(get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))) == 16
    roberta = RobertaForCausalLM(
        RobertaConfig(
            vocab_size=23,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=18,  # of which its padding index takes two
            is_decoder=True,
        )
    ).eval()
    assert context_length(roberta) == 16
    roberta(torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 17), 5))


@pytest.mark.parametrize("token", [-1, 23])
def test_tokens_outside_the_vocabulary_are_refused(token):
    data = batch()
    data["input_ids"][1, 0] = token
    with pytest.raises(ValueError, match=f"calibration batch 1 .* vocabulary of 23 but got {token}"):
        batches_for(tiny_llama(), [batch(), data])


def test_samples_are_checked_as_calibration_is():
    base = tiny_llama()
    bad = greedy_batch(base)
    bad["input_ids"][0, 0] = 99
    with pytest.raises(ValueError, match="sampled batch 0 .* vocabulary of 23 but got 99"):
        rejuvenate(sharpened(base), base, [greedy_batch(base)], sampler=lambda _: [bad])
    shifted = {k: v[:, 1:] if k == "labels" else v[:, :-1] for k, v in greedy_batch(base).items()}
    with pytest.raises(ValueError, match="labels of sampled batch 0"):
        rejuvenate(sharpened(base), base, [greedy_batch(base)], sampler=lambda _: [shifted])


class Seeing(nn.Module):
    """A language model with an input that the library knows nothing of."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 4)

    def forward(self, input_ids, pixel_values=None):
        return self.embed(input_ids) @ self.embed.weight.T


class Caching(Seeing):
    def forward(self, input_ids, cache_position=None):
        return super().forward(input_ids)


def test_a_tensor_that_the_model_takes_is_never_ignored():
    pixels = {**pairs(9), "pixel_values": torch.zeros(2, 3, 4, 4)}
    with pytest.raises(ValueError, match="'pixel_values', which Seeing takes"):
        batches_for(Seeing(), [pixels])
    assert len(batches_for(tiny_llama(), [pixels])) == 1  # takes none
    assert len(batches_for(Seeing(), [{**pairs(9), "pixel_values": None, "note": "text"}])) == 1
    about = {"document_ids": torch.tensor([4, 5]), "cache_position": torch.arange(9)}  # of rows; and no cache
    (found,) = batches_for(Caching(), [{**pairs(9), **about}])
    assert found.inputs["input_ids"].shape == (2, 9)
    with pytest.raises(ValueError, match="'cache_position', which Caching takes"):
        batches_for(Caching(), [{**pairs(9), "cache_position": torch.arange(1, 10)}])
    with pytest.raises(ValueError, match="'inputs_embeds', which LlamaForCausalLM takes"):
        batches_for(tiny_llama(), [{**pairs(9), "inputs_embeds": torch.zeros(2, 9, 16)}])


def test_positions_are_refused_where_the_model_takes_none():
    ahead = {**pairs(9), "position_ids": torch.arange(3, 12).expand(2, 9)}
    with pytest.raises(ValueError, match="`position_ids` of calibration batch 0 .* Seeing"):
        batches_for(Seeing(), [ahead])
    assert len(batches_for(Seeing(), [{**ahead, "position_ids": torch.arange(9)}])) == 1


def test_a_model_that_takes_tokens_alone_is_not_given_a_mask():
    data = pairs(9)
    data["labels"][0, -2:] = -100  # of two lengths, so that one is padded
    found = rejuvenate(Seeing(), Seeing(), [data], alpha="auto", sampler=lambda _: [data])
    assert found.search.curve


@pytest.mark.parametrize(
    ("options", "advice"),
    [({"reset": Reset(fraction=0.1)}, "Pass `reset=None`"), ({}, "Pass a number for `alpha`")],
    ids=["reset", "search"],
)
def test_an_encoder_decoder_is_refused_and_can_be_fused(options, advice):
    """Given tokens alone, BART makes a decoder's input of them: numbers that look right and are not."""
    from transformers import BartConfig, BartForConditionalGeneration

    parts = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    sizes = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in parts.items()}
    config = BartConfig(
        vocab_size=23, d_model=16, max_position_embeddings=64, decoder_start_token_id=2, **sizes
    )
    base = BartForConditionalGeneration(config)
    sft = shifted(base)
    before = copy.deepcopy(sft.state_dict())
    with pytest.raises((TypeError, ValueError), match=f"BartForConditionalGeneration.*{advice}"):
        rejuvenate(sft, base, [batch()], **options)
    assert all(torch.equal(value, before[name]) for name, value in sft.state_dict().items())
    report = rejuvenate(sft, base, alpha=0.5)
    assert report.drift_after == pytest.approx(report.drift_before / 2, rel=1e-5)
