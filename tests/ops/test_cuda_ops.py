"""The public ops on a GPU: rows of every alignment, from hidden states, compiled, on a side stream."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv import ops
from lightning_rejuv.ops import reference
from tests.gpu import DEVICE, on_gpu

pytestmark = on_gpu
HALF_TYPES = [torch.bfloat16, torch.float16]


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def targets(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)


# 0, 8 and 12 modulo 16, and odd; enough rows that none is split.
@pytest.mark.parametrize("vocabulary", [4112, 4104, 4108, 4097, 32008])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
def test_rows_of_every_alignment(vocabulary, dtype):
    logits, target = (3 * normal(600, vocabulary)).to(dtype), targets(600, vocabulary)
    found, (stats, ids) = ops.token_stats(logits, target), reference.token_stats(logits, target)
    for name, want in zip(("entropy", "logsumexp", "logprob", "top1_prob"), stats, strict=True):
        torch.testing.assert_close(getattr(found, name), want, rtol=3e-6, atol=4e-6)
    assert torch.equal(found.top1_id, ids)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
def test_token_stats_from_hidden_have_float32_logits(dtype, bias):
    hidden, weight = normal(70, 128).to(dtype), (0.2 * normal(5003, 128, seed=1)).to(dtype)
    offset = normal(5003, seed=2).to(dtype) if bias else None
    target = targets(70, 5003)
    logits = hidden.double() @ weight.double().t() + (0.0 if offset is None else offset.double())
    stats, _ = reference.token_stats(logits, target, 0.8)
    found = ops.token_stats_from_hidden(hidden, weight, target, 0.8, bias=offset, chunk_size=32)
    for name, want in zip(("entropy", "logsumexp", "logprob"), stats, strict=False):
        torch.testing.assert_close(getattr(found, name), want, rtol=1e-4, atol=1e-4)


def statistics(h: torch.Tensor, target: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    ops.activation_stats(h, eps=0.1, out=table)
    drift = ops.weight_drift(h, 2 * h).rows.drift_square
    return ops.token_stats(h, target).entropy.sum() + drift.sum()


def test_one_compiled_graph_counts_like_eager():
    h, target = normal(64, 1000).bfloat16(), targets(64, 1000)
    tables = torch.zeros(2, 7, 1000, dtype=torch.float64, device=DEVICE)
    found = torch.compile(statistics, fullgraph=True)(h, target, tables[0])
    torch.testing.assert_close(found, statistics(h, target, tables[1]))
    torch.testing.assert_close(tables[0], tables[1])
    assert tables[0][6].eq(64).all()


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA has streams")
def test_a_side_stream_gives_the_same():
    logits, target = normal(512, 4096).bfloat16(), targets(512, 4096)
    expected, side = ops.token_stats(logits, target), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = ops.token_stats(logits, target)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found.entropy, expected.entropy)
    assert torch.equal(found.top1_id, expected.top1_id)
