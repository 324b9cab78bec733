"""How calibration batches are sampled from: padding, their size, the context, positions and token types."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.alpha.sampling import sample_with_generate
from lightning_rejuv.calibration.batches import as_batches
from tests.alpha.test_sampling import data
from tests.conftest import greedy_batch, sharpened, tiny_llama


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_calibration_finds_the_alpha_of_unpadded(side):
    base = tiny_llama()
    before = (6, 0) if side == "left" else (0, 6)
    padded = [
        {
            "input_ids": torch.nn.functional.pad(b["input_ids"], before, value=22),
            "labels": torch.nn.functional.pad(b["labels"], before, value=-100),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(b["labels"]), before),
        }
        for b in data(base)
    ]
    found = [
        rejuvenate(sharpened(base), base, batches, reset=Reset(fraction=0.1))
        for batches in (data(base), padded)
    ]
    assert 0 < found[0].alpha < 1
    assert found[0].alpha == pytest.approx(found[1].alpha)
    curves = [[value for point in report.search.curve for value in astuple(point)] for report in found]
    assert curves[0] == pytest.approx(curves[1])
    assert sum(g.reset for g in found[0].neurons) > 0
    assert [g.reset for g in found[0].neurons] == [g.reset for g in found[1].neurons]


def test_no_pass_is_larger_than_the_callers_batches():
    base = tiny_llama()
    sft = sharpened(base)
    rows = [{k: v[i : i + 1] for k, v in greedy_batch(base, rows=12).items()} for i in range(12)]
    seen = []
    sft.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    rejuvenate(sft, base, rows, reset=Reset(fraction=0.1))
    assert max(shape[0] for shape in seen) == 1
    # Many rows of a few tokens beside a few rows of many: neither rows nor tokens are multiplied, but in `generate`.
    seen.clear()
    sampling, generate = [], sft.generate

    def generate_apart(**options):
        before = len(seen)
        found = generate(**options)
        sampling.extend(seen[before:])
        del seen[before:]
        return found

    sft.generate = generate_apart
    long = greedy_batch(base, rows=2, length=40)
    long["labels"][:, :38] = -100
    rejuvenate(sft, base, [greedy_batch(base, rows=20, length=5), *[long] * 5], reset=Reset(fraction=0.1))
    assert max(shape[0] for shape in (*seen, *sampling)) <= 20
    assert max(shape.numel() for shape in seen) <= 100
    assert max(shape.numel() for shape in sampling) <= 400


def gpt2(positions=16):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=23,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=positions,
            bos_token_id=21,
            eos_token_id=22,
        )
        model = GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.4)
    return model


def test_new_tokens_stop_at_the_context():
    base = gpt2(40)
    base.generation_config.eos_token_id = None
    ids = torch.randint(1, 21, (4, 15), generator=torch.Generator().manual_seed(0))
    batches = [
        {
            "input_ids": ids[:, :length],
            "labels": ids[:, :length].masked_fill(torch.arange(length) < start, -100),
        }
        for start, length in ((4, 12), (10, 13), (14, 15))
    ]
    found = sample_with_generate(as_batches(batches), seed=0)(base)
    lengths = [(int((s["labels"][0] != -100).int().argmax()), s["input_ids"].shape[1]) for s in found]
    assert set(lengths) == {(4, 4 + 4 * 8), (10, 40), (14, 40)}  # and not 42 or 46
    assert sum(len(s["input_ids"]) for s in found) == 12
    sft = sharpened(base)
    assert 0 <= rejuvenate(sft, base, [greedy_batch(sft, rows=4, length=40)]).alpha <= 1


def test_positions_and_token_types_go_along():
    """Near to greedy, what is sampled is what the model itself finds likeliest with the same positions and types."""
    base = gpt2(32)
    base.generation_config.eos_token_id = None
    with torch.no_grad():
        base.transformer.ln_f.weight.mul_(20000)
        base.transformer.ln_f.bias.mul_(20000)
    ids = torch.randint(1, 21, (3, 9), generator=torch.Generator().manual_seed(0))
    positions, types = torch.arange(5, 14).expand(3, 9), torch.randint(1, 21, (3, 9))
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(torch.arange(9) < 4, -100),
        "position_ids": positions,
        "token_type_ids": types,
    }
    (checked,) = as_batches([batch])
    torch.testing.assert_close(checked.inputs["position_ids"], positions.contiguous())
    samples = sample_with_generate([checked], seed=0)(base)
    # Of one length, so that rows can be put together again, in the order of their prompts.
    found = {k: torch.cat([sample[k] for sample in samples]) for k in samples[0]}
    order = [found["input_ids"][:, :4].tolist().index(prompt) for prompt in ids[:, :4].tolist()]
    found = {k: tensor[order] for k, tensor in found.items()}
    assert torch.equal(found["position_ids"], torch.arange(5, 5 + 4 + 20).expand(3, 24))
    assert torch.equal(found["token_type_ids"][:, 4:], types[:, 3:4].expand(3, 20))
    inputs = {k: found[k] for k in ("input_ids", "position_ids", "token_type_ids")}
    with torch.no_grad():
        assert torch.equal(base(**inputs).logits[:, 3:-1].argmax(-1), found["input_ids"][:, 4:])
        assert not torch.equal(base(found["input_ids"]).logits[:, 3:-1].argmax(-1), found["input_ids"][:, 4:])


def test_left_padding_of_learned_positions_counts_from_the_first_token():
    from lightning_rejuv.attribution import confidence

    base = gpt2(32)
    ids = torch.randint(1, 21, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    (found,) = as_batches(
        [
            {
                "input_ids": torch.nn.functional.pad(ids, (5, 0)),
                "labels": torch.nn.functional.pad(labels, (5, 0), value=-100),
                "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (5, 0)),
            }
        ]
    )
    with torch.no_grad():
        log_probs = base(ids).logits.double().log_softmax(-1)[:, 3:-1]
    expected = log_probs.gather(2, ids[:, 4:, None])[..., 0].sum(1)
    torch.testing.assert_close(
        confidence(base, found).log_prob.nansum(1).double(), expected, rtol=1e-4, atol=1e-4
    )
