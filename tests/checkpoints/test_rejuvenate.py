from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch

from lightning_rejuv import Reset
from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from lightning_rejuv.checkpoints.reader import Reader
from tests.checkpoints.directories import (
    TEMPLATE,
    WORDS,
    edit_config,
    fuse,
    pair,
    resave,
    tensors,
    write_tokenizer,
)
from tests.conftest import nested


@pytest.fixture
def models(tmp_path):
    return pair(tmp_path)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fusion_is_correctly_rounded(tmp_path, alpha, dtype):
    base, sft = pair(tmp_path, dtype=dtype, tokenizer=False)
    out, _ = fuse(base, sft, alpha=alpha, rounding="nearest")
    sft_tensors, base_tensors = tensors(sft), tensors(base)
    for name, tensor in tensors(out).items():
        exact = alpha * sft_tensors[name].double() + (1 - alpha) * base_tensors[name].double()
        assert tensor.dtype == dtype
        if alpha in (0.0, 1.0) or (alpha == 0.5 and dtype != torch.float32):
            assert torch.equal(tensor, exact.to(dtype)), name
        # Half a step of the dtype, and what float32 arithmetic adds to it.
        size = exact.abs().clamp_min(torch.finfo(dtype).smallest_normal)
        half_step = (
            size * torch.finfo(dtype).eps / 2
            + 2e-7 * (sft_tensors[name].abs() + base_tensors[name].abs()).double()
        )
        assert bool(((tensor.double() - exact).abs() <= 1.01 * half_step).all()), name


def test_half_and_half_in_bfloat16_is_exact_for_every_exponent(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    pattern = torch.randint(
        -(2**15), 2**15, (32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int16
    )
    wild = pattern.view(torch.bfloat16)
    wild = torch.where(wild.abs() < 1e37, wild, 1.0)  # NaN and what overflows when added

    def change(seed):
        def apply(state):
            generator = torch.Generator().manual_seed(seed)
            for name in state:
                if name.endswith("mlp.up_proj.weight"):
                    flat = wild.flatten()
                    state[name] = flat[
                        torch.randperm(len(flat), generator=generator)[: state[name].numel()]
                    ].view(state[name].shape)
            return state

        return apply

    resave(base, change(0))
    resave(sft, change(1))
    out, _ = fuse(base, sft, rounding="nearest")
    sft_tensors, base_tensors, fused = tensors(sft), tensors(base), tensors(out)
    for name, tensor in fused.items():
        assert torch.equal(
            tensor, (0.5 * sft_tensors[name].float() + 0.5 * base_tensors[name].float()).bfloat16()
        ), name


def test_mixed_dtypes_keep_the_sft_models_and_lose_nothing_on_the_way(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    resave(base, lambda state: {name: t.float() + 1e-4 for name, t in state.items()})
    norm = "model.norm.weight"
    resave(sft, lambda state: {name: t.float() if name == norm else t for name, t in state.items()})
    out, _ = fuse(base, sft, alpha=0.3, rounding="nearest")
    sft_tensors, base_tensors, fused = tensors(sft), tensors(base), tensors(out)
    assert fused[norm].dtype == torch.float32
    for name, tensor in fused.items():
        assert torch.equal(
            tensor,
            torch.lerp(sft_tensors[name].float(), base_tensors[name].float(), 0.7).to(
                sft_tensors[name].dtype
            ),
        )


@pytest.mark.parametrize("to", ["float32", "float16"])
def test_another_dtype_is_said_in_config_and_index(models, to):
    base, sft = models
    norm = "model.norm.weight"
    resave(sft, lambda state: {name: t.float() if name == norm else t for name, t in state.items()})
    out, _ = fuse(base, sft, dtype=to, rounding="nearest")
    fused = tensors(out)
    assert {str(t.dtype) for name, t in fused.items() if name != norm} == {f"torch.{to}"}
    assert fused[norm].dtype == torch.float32  # the SFT model's exception stays one
    assert json.loads((out / "config.json").read_text())["dtype"] == to
    sft_tensors, base_tensors = tensors(sft), tensors(base)
    for name, tensor in fused.items():
        assert torch.equal(
            tensor, (0.5 * sft_tensors[name].double() + 0.5 * base_tensors[name].double()).to(tensor.dtype)
        )
    assert verify(out)


def test_rounding_is_unbiased_and_repeats_by_seed(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    resave(base, lambda state: {name: torch.ones_like(t) for name, t in state.items()})
    resave(sft, lambda state: {name: torch.full_like(t, 1 + 1 / 128) for name, t in state.items()})
    nearest, report = fuse(base, sft, alpha=0.25, rounding="nearest")
    assert report.total.rounding_shift == pytest.approx(-0.25)
    assert all(bool((t == 1).all()) for t in tensors(nearest).values())
    first, second, other = (fuse(base, sft, alpha=0.25, seed=s)[0] for s in (0, 0, 1))
    values = torch.cat([t.flatten() for t in tensors(first).values()]).double()
    assert set(values.tolist()) == {1.0, 1 + 1 / 128}
    assert abs(values.mean().item() - (1 + 0.25 / 128)) < 5 * (1 / 128) / (4 * len(values)) ** 0.5
    same = [torch.equal(t, tensors(second)[name]) for name, t in tensors(first).items()]
    assert all(same)
    assert not all(torch.equal(t, tensors(other)[name]) for name, t in tensors(first).items())


def test_alpha_by_name(models):
    base, sft = models
    alphas = {"*.layers.0.*": 1.0, "*embed*": 0.0, "*": 0.5}
    out, report = fuse(base, sft, alpha=alphas, rounding="nearest")
    sft_tensors, base_tensors, fused = tensors(sft), tensors(base), tensors(out)
    for name, tensor in fused.items():
        alpha = 1.0 if ".layers.0." in name else 0.0 if "embed" in name else 0.5
        assert torch.equal(
            tensor, (alpha * sft_tensors[name].float() + (1 - alpha) * base_tensors[name].float()).bfloat16()
        ), name
    assert report.to_dict()["alpha"]["*"] == 0.5
    with pytest.raises(ValueError, match="no parameter fits"):
        fuse(base, sft, alpha={"*.mpl.*": 1.0, "*": 0.5})


def test_everything_beside_the_weights_is_the_sft_models(models):
    base, sft = models
    (sft / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.7}')
    (sft / "additional_chat_templates").mkdir()
    (sft / "additional_chat_templates" / "tool.jinja").write_text("x")
    (sft / "modeling_own.py").write_text("# custom code")
    for left in ("optimizer.pt", "training_args.bin", "trainer_state.json", "pytorch_model.bin", "latest"):
        (sft / left).write_bytes(b"x")
    (sft / "global_step_1").mkdir()
    (sft / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    out, _ = fuse(base, sft)
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "modeling_own.py",
    ):
        assert (out / name).read_bytes() == (sft / name).read_bytes(), name
    assert (out / "model.safetensors.index.json").read_bytes() == (
        sft / "model.safetensors.index.json"
    ).read_bytes()
    assert (out / "generation_config.json").read_bytes() == (sft / "generation_config.json").read_bytes()
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    absent = {
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "pytorch_model.bin",
        "latest",
        "global_step_1",
    }
    assert not absent & set(os.listdir(out))
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n")
    assert "## Rejuvenation" in card
    again, _ = fuse(base, out)
    assert (again / "README.md").read_text().count("## Rejuvenation") == 1
    assert verify(out), verify(out)


def test_provenance_names_inputs_and_outputs_by_their_sha256(models):
    base, sft = models
    out, report = fuse(base, sft, alpha=0.4)
    said = json.loads((out / "rejuvenation.json").read_text())
    assert said == json.loads(json.dumps(report.to_dict()))
    for role, path in (("base", base), ("sft", sft)):
        found = said["inputs"][role]["sha256"]
        assert {p.name for p in path.glob("*.safetensors")} | {"config.json", "tokenizer.json"} <= set(found)
        for name, digest in found.items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    for name, digest in said["outputs"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert said["options"]["alpha"] == said["alpha"] == 0.4
    reference = torch.cat(
        [(t.double() - tensors(base)[n].double()).flatten() for n, t in tensors(sft).items()]
    )
    norm = torch.cat([t.double().flatten() for t in tensors(base).values()]).norm()
    assert said["total"]["drift"] == pytest.approx(float(reference.norm() / norm), rel=1e-5)


def test_inputs_are_untouched_and_nothing_is_overwritten(models):
    base, sft = models
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for d in (base, sft) for p in d.iterdir()}
    out, _ = fuse(base, sft)
    with pytest.raises(FileExistsError, match="Nothing is ever overwritten"):
        rejuvenate_checkpoint(base, sft, out, alpha=0.5)
    for inside in (sft, sft / "inner", base / "a" / "b"):
        with pytest.raises((ValueError, FileExistsError)):
            rejuvenate_checkpoint(base, sft, inside, alpha=0.5)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for d in (base, sft) for p in d.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "argument `alpha`"),
        ({"alpha": float("nan")}, "argument `alpha`"),
        ({"reset": -0.1}, "argument `reset` to be a `Reset` or None"),
        ({"reset": Reset(fraction=0.01)}, "Expected calibration data"),
        ({"alpha": "auto"}, "Expected calibration data"),
        ({"reset.rank_by": "luck"}, "argument `rank_by`"),
        ({"reset.fraction": 0}, "argument `fraction` of `Reset` to be a number above 0"),
        ({"dtype": "int8"}, "argument `dtype`"),
        ({"compute_dtype": None}, "argument `compute_dtype`"),
    ],
)
def test_arguments_out_of_range(models, options, message):
    with pytest.raises(ValueError, match=message):
        fuse(*models, **nested(options))
    assert sorted(p.name for p in models[0].parent.iterdir()) == ["base", "sft"]


def test_other_rope_settings_are_a_warning(models):
    base, sft = models
    edit_config(base, rms_norm_eps=1e-3)
    _, report = fuse(base, sft)
    assert any("rms_norm_eps" in warning for warning in report.warnings)
    assert "rms_norm_eps" in str(report)


def test_a_disk_too_small_is_said_before_anything_is_written(models, monkeypatch):
    base, sft = models
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="GiB free"):
        fuse(base, sft)
    assert sorted(p.name for p in sft.parent.iterdir()) == ["base", "sft"]


def test_what_is_copied_beside_the_weights_needs_room_too(models, monkeypatch):
    base, sft = models
    beside = [path for path in sft.iterdir() if not path.name.startswith("model")]
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in beside}
    free = sum(t.nbytes for t in tensors(sft).values()) + sum(path.stat().st_size for path in beside) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(OSError, match="GiB free"):
        fuse(base, sft)
    assert sorted(p.name for p in sft.parent.iterdir()) == ["base", "sft"]
    free += 1
    fuse(base, sft)


@pytest.mark.parametrize("moved", [False, True])
def test_only_pieces_of_a_tensor_are_in_memory(tmp_path, monkeypatch, moved):
    """Neither model, tensor nor shard decides how much is read at a time."""
    base, sft = pair(tmp_path, hidden_size=128, vocab_size=20_000, tokenizer=False)
    assert max(t.numel() for t in tensors(base).values()) == 20_000 * 128
    if moved:
        words = [*WORDS, *(f"w{i}" for i in range(20_000 - len(WORDS)))]
        write_tokenizer(base, words)
        write_tokenizer(sft, [*WORDS, "new", *words[len(WORDS) : -1]])
    sizes, read = [], Reader.read

    def recorded(self, name, start=0, count=None):
        found = read(self, name, start, count)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Reader, "read", recorded)
    out, report = fuse(base, sft)
    assert max(sizes) <= 2**18
    assert (report.vocabulary is not None) == moved
    assert verify(out)


def test_an_output_below_links_in_a_circle_is_an_error_of_the_file_system(tmp_path):
    base, sft = pair(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle"):
        rejuvenate_checkpoint(base, sft, tmp_path / "circle" / "out", alpha=0.5)
