"""What the stream measures and refuses on the way, against the tensors that it read and wrote."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from lightning_rejuv.checkpoints.stream import TensorStatistics, pooled
from tests.checkpoints.directories import fuse, pair, resave, tensors
from tests.conftest import shift_of_alpha


def _changed(name, change):
    return lambda state: {n: change(t) if n == name else t for n, t in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_that_of_the_weights_read_and_written(tmp_path, dtype):
    """Norms of all weights; in every eighth row what SFT changed, and where there is a fusion what rounding does."""
    base, sft = pair(tmp_path, dtype=dtype, tokenizer=False, drift=2e-3)
    kept = "model.layers.0.mlp.up_proj.weight"
    out, report = fuse(base, sft, alpha={kept: 1.0, "*": 0.3}, rounding="nearest")
    sft_tensors, base_tensors, fused = tensors(sft), tensors(base), tensors(out)
    assert set(report.tensors) == set(sft_tensors)
    for name, found in report.tensors.items():
        w, b, f = (t[name].double() for t in (sft_tensors, base_tensors, fused))
        assert found.count == w.numel()
        assert found.difference == pytest.approx(float((w - b).square().sum()), rel=1e-5)
        assert found.base == pytest.approx(float(b.square().sum()), rel=1e-5)
        w, b, f = (t[::8] for t in (w, b, f))
        moved = w != b
        gap = float(((b - w) * (0.3 * w + 0.7 * b - f)).sum())
        assert (found.sampled, found.changed) == (w.numel(), int(moved.sum())), name
        assert found.changed_share == pytest.approx(float(moved.double().mean()))
        expected = (gap, float((b - w).square().sum()))
        tolerance = {"rel": 1e-3, "abs": 1e-7 * float(w.square().sum())}
        measured = (found.gap, found.line)
        assert measured == ((0, 0) if name == kept else pytest.approx(expected, **tolerance)), name
    assert torch.equal(fused[kept], sft_tensors[kept])
    assert (abs(report.total.rounding_shift) > 0.01) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("alpha", [1.0, 0.4, 0.0, {"*embed*": 0.4, "*": 1.0}], ids=str)
def test_what_sft_changed_does_not_depend_on_alpha(tmp_path, alpha):
    """One weight of each eighth row and each tensor, whether it is fused or not; in the table and in JSON."""
    base, sft = pair(tmp_path, tokenizer=False, drift=0)

    def change(tensor):
        changed = tensor.clone().view(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
        changed[::8, 0] += 1
        return changed.view(tensor.shape)

    resave(sft, lambda state: {name: change(tensor) for name, tensor in state.items()})
    _, report = fuse(base, sft, alpha=alpha)
    rows = {name: t.view(-1, t.shape[-1] if t.dim() > 1 else 1)[::8] for name, t in tensors(base).items()}
    told = report.to_dict()
    for name, part in rows.items():
        assert told["tensors"][name]["changed"] == pytest.approx(1 / part.shape[1]), name
    share = sum(len(part) for part in rows.values()) / sum(part.numel() for part in rows.values())
    assert told["total"]["changed"] == pytest.approx(share)
    assert f"changed by SFT   {share:.1%} of the weights" in str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("whose", ["base", "sft"])
def test_what_is_not_finite_is_named_with_its_file(tmp_path, value, whose):
    base, sft = pair(tmp_path, tokenizer=False)
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensor):
        tensor[3, 5] = value
        return tensor

    resave({"base": base, "sft": sft}[whose], _changed(name, spoil))
    with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity in '.*/{whose}'"):
        fuse(base, sft)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "sft"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_fusion_that_the_outputs_dtype_cannot_hold_is_refused(tmp_path, sign, rounding):
    base, sft = pair(tmp_path, tokenizer=False)
    name = "model.norm.weight"
    for path in (base, sft):
        resave(path, _changed(name, lambda t: torch.full_like(t, sign * 1e6)))
    with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinity in 'the fusion in its dtype'"):
        fuse(base, sft, dtype="float16", rounding=rounding)


def test_the_main_dtype_is_that_of_most_weights_not_of_most_tensors(tmp_path):
    base, sft = pair(tmp_path, vocab_size=3000, tokenizer=False)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    resave(sft, lambda state: {n: t if n in tables else t.float() for n, t in state.items()})
    sft_tensors = tensors(sft)
    assert sum(n in tables for n in sft_tensors) < len(sft_tensors) / 2
    out, _ = fuse(base, sft, dtype="float16")
    kinds = {name: t.dtype for name, t in tensors(out).items()}
    assert {name for name, kind in kinds.items() if kind == torch.float16} == set(tables)
    assert {kind for name, kind in kinds.items() if name not in tables} == {torch.float32}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_progress_counts_the_sft_models_bytes(tmp_path, dtype):
    base, sft = pair(tmp_path, tokenizer=False)
    told = []
    fuse(base, sft, dtype=dtype, progress=lambda *step: told.append(step))
    size = sum(t.nbytes for t in tensors(sft).values())
    assert {(phase, total) for phase, _, total in told} == {("fusing the weights", size)}
    done = [done for _, done, _ in told]
    assert (done[0], done[-1]) == (0, size)
    assert done == sorted(done)
    assert len(set(done)) > 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_number_of_threads_is_as_before(tmp_path, fails):
    base, sft = pair(tmp_path, tokenizer=False)
    if fails:
        resave(sft, _changed("model.norm.weight", lambda t: t * float("nan")))
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(ValueError, match="holds NaN"):
                fuse(base, sft)
        else:
            fuse(base, sft)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_rows_are_rounded_independently(tmp_path):
    """A column of equal weights: stochastic rounding takes some of its rows up and some down."""
    base, sft = pair(tmp_path, tokenizer=False)
    resave(base, lambda state: {name: torch.ones_like(t) for name, t in state.items()})
    resave(sft, lambda state: {name: torch.full_like(t, 1 + 1 / 128) for name, t in state.items()})
    out, _ = fuse(base, sft, alpha=0.5)
    for name, tensor in tensors(out).items():
        if tensor.dim() == 2:
            up = (tensor > 1).double().mean(0)
            assert bool(((up > 0) & (up < 1)).all()), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_rounded_as_its_embedding_only_where_the_two_are_tied(tied, tmp_path):
    base, sft = pair(tmp_path, tie_word_embeddings=tied, tokenizer=False)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for path, value in ((base, 1.0), (sft, 1 + 1 / 128)):
        table = torch.full((48, 32), value, dtype=torch.bfloat16)
        resave(path, lambda state, t=table: {**state, embedding: t.clone(), head: t.clone()})
    out, _ = fuse(base, sft, alpha=0.5)
    fused = tensors(out)
    assert set(fused[head].flatten().tolist()) == {1.0, 1 + 1 / 128}
    alike = float((fused[head] == fused[embedding]).double().mean())
    # Two independent streams agree in half of the weights.
    assert alike == 1.0 if tied else abs(alike - 0.5) < 5 * (0.25 / (48 * 32)) ** 0.5


def test_statistics_of_pieces_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 8, generator=generator).bfloat16().float()
    sft = (
        torch.where(torch.rand(64, 8, generator=generator) < 0.5, base * (1 + 1 / 200), base)
        .bfloat16()
        .float()
    )
    exact = 0.3 * sft + 0.7 * base
    fused = exact.bfloat16()
    whole = TensorStatistics()
    for start in range(0, 64, 16):
        piece = slice(start, start + 16)
        one = TensorStatistics()
        difference, rows = sft[piece] - base[piece], slice(None, None, 8)
        one.add(difference, base[piece])
        one.add_sampled(difference[rows].contiguous(), exact[piece][rows], fused[piece][rows], 0.3)
        whole = pooled([whole, one])
    assert whole.drift == pytest.approx(float((sft - base).double().norm() / base.double().norm()), rel=1e-5)
    rows = slice(None, None, 8)
    changed = sft[rows] != base[rows]
    assert whole.changed == int(changed.sum())
    shift = shift_of_alpha(*({"": t[rows]} for t in (sft, base, fused)), 0.3)
    assert whole.rounding_shift == pytest.approx(shift, rel=1e-3)
    assert shift < -0.1
    assert TensorStatistics(difference=1.0).drift == math.inf
    assert TensorStatistics().drift == TensorStatistics().rounding_shift == 0.0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_size_of_a_block_changes_no_bit_and_no_count(tmp_path, monkeypatch, dtype, rounding):
    """Rows of 3, 50 and 1 weights: the random bits of a block begin where those of the one before end."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (301, 3), "b.weight": (2, 7, 50), "c.weight": (1001,), "d.weight": ()}
    for path, noise in ((tmp_path / "base", 0.0), (tmp_path / "sft", 0.01)):
        path.mkdir()
        (path / "config.json").write_text("{}")
        state = {
            n: torch.ones(s) + noise * torch.randn(s, generator=generator).to(dtype)
            for n, s in shapes.items()
        }
        save_file({n: t.to(dtype) for n, t in state.items()}, path / "model.safetensors")
    monkeypatch.setattr("lightning_rejuv.checkpoints.stream._PIECE", 400)
    found = []
    for block in (1 << 17, 1, 100):
        monkeypatch.setattr("lightning_rejuv.checkpoints.stream._BLOCK", block)
        found.append(fuse(tmp_path / "base", tmp_path / "sft", rounding=rounding, dtype="bfloat16"))
    (whole, report), *others = found
    for out, other in others:
        assert all(torch.equal(t, tensors(out)[n]) for n, t in tensors(whole).items())
        for name, of_whole in report.tensors.items():
            assert vars(other.tensors[name]) == pytest.approx(vars(of_whole), rel=1e-5, abs=1e-9)
            assert other.tensors[name].changed == of_whole.changed > 0


@pytest.mark.parametrize("which", ["base", "sft"])
def test_weights_whose_square_is_infinite_are_finite(tmp_path, which):
    base, sft = pair(tmp_path, tokenizer=False)
    resave(
        {"base": base, "sft": sft}[which], _changed("model.norm.weight", lambda t: torch.full_like(t, 1e25))
    )
    out, report = fuse(base, sft, rounding="nearest")
    assert float(tensors(out)["model.norm.weight"].min()) == pytest.approx(5e24, rel=1e-2)
    own, anchor = (torch.cat([t.double().flatten() for t in tensors(path).values()]) for path in (sft, base))
    assert report.total.drift == pytest.approx(float((own - anchor).norm() / anchor.norm()), rel=1e-5)
    assert math.isfinite(report.total.rounding_shift)
