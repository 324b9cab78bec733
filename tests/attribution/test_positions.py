from __future__ import annotations

import torch

from lightning_rejuv.attribution.confidence import Confidence, confidence, mean_entropy, nll_per_response
from lightning_rejuv.attribution.positions import select_positions
from lightning_rejuv.calibration.batches import as_batches
from tests.conftest import batch, tiny_llama


def _brute_force(sft, base, response, rule, count):
    chosen = []
    for row in range(len(response)):
        gaps = {}
        for time in range(response.shape[1]):
            gap = float(base.entropy[row, time] - sft.entropy[row, time])
            if not response[row, time]:
                continue
            if rule == "sharpened" and (base.log_prob[row, time].exp() < 0.25 or gap <= 0):
                continue
            gaps[time] = gap if rule == "sharpened" else abs(gap)
        chosen += [(row, t) for t in sorted(gaps, key=lambda t: -gaps[t])[:count]]
    return sorted(chosen)


def test_against_brute_force():
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        rand = lambda: torch.rand(4, 7, generator=generator)  # noqa: E731
        sft, base = (Confidence(2 * rand(), rand().log()) for _ in range(2))
        response = rand() > 0.4
        for rule in ("sharpened", "entropy_gap"):
            for count in (1, 3):
                got = select_positions(sft, base, response, rule, count)
                pairs = sorted(zip(got.row.tolist(), got.time.tolist(), strict=True))
                assert pairs == _brute_force(sft, base, response, rule, count)
                first = got.rank == 0
                assert len(got.row[first].unique()) == int(first.sum())
                known = [bool(base.log_prob[r, t].exp() >= 0.25) for r, t in pairs]
                narrowed = [bool(base.entropy[r, t] > sft.entropy[r, t]) for r, t in pairs]
                sure = [bool(sft.log_prob[r, t].exp() > 0.5) for r, t in pairs]
                assert got.sharpened == sum(k and n for k, n in zip(known, narrowed, strict=True))
                assert got.learned == sum(s and not k for k, s in zip(known, sure, strict=True))


def test_confidence_is_that_of_the_response_tokens():
    model = tiny_llama()
    data = batch()
    [checked] = as_batches([data])
    result = confidence(model, checked)
    with torch.no_grad():
        logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits.double()
    log_probs = logits.log_softmax(-1)
    entropies, nll = [], torch.zeros(3, dtype=torch.float64)
    for row in range(3):
        for time in range(8):
            label = data["labels"][row, time + 1]
            if label == -100:
                assert result.entropy[row, time].isnan()
                continue
            p = log_probs[row, time]
            entropies.append(-(p.exp() * p).sum())
            nll[row] -= p[label]
            torch.testing.assert_close(
                result.entropy[row, time].double(), entropies[-1], rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(result.log_prob[row, time].double(), p[label], rtol=1e-5, atol=1e-6)
    assert abs(mean_entropy([result]) - float(torch.stack(entropies).mean())) < 1e-6
    assert abs(nll_per_response([result]) - float(nll.mean())) < 1e-5


def test_the_ends_of_the_rule():
    """p = 0.25 exactly is known; an entropy that has not fallen is not sharpened, known or not."""
    quarter, half = torch.tensor([0.25, 0.5]).log()
    base = Confidence(torch.tensor([[1.0, 1.0, 1.0]]), torch.stack([quarter, quarter, half])[None])
    sft = Confidence(torch.tensor([[0.5, 1.0, 1.5]]), torch.zeros(1, 3))
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    chosen = select_positions(sft, base, everywhere, "sharpened", 3)
    assert chosen.time.tolist() == [0]
    assert (chosen.sharpened, chosen.learned) == (1, 0)
    nothing = select_positions(base, base, everywhere, "entropy_gap", 3)
    assert (len(nothing), nothing.sharpened) == (3, 0)
