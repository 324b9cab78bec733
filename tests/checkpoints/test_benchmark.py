"""The benchmark of the fusion on disk still runs; what it measures is not looked at."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file

from benchmarks import checkpoints
from tests.checkpoints.directories import fuse

SIZE = (128, 1, 64, 100)


def test_the_bare_lerp_writes_what_a_fusion_does(tmp_path):
    checkpoints.write_checkpoint(tmp_path / "base", SIZE, 0)
    checkpoints.write_checkpoint(tmp_path / "sft", SIZE, 0, noise=0.1)
    out, _ = fuse(tmp_path / "base", tmp_path / "sft", rounding="nearest")
    expected = load_file(out / "model.safetensors")
    for hashes in (False, True):
        checkpoints.bare(tmp_path / "base", tmp_path / "sft", tmp_path / f"bare{hashes}", hashes)
        found = load_file(tmp_path / f"bare{hashes}" / "model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert found.keys() == expected.keys()


def test_every_contender_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checkpoints", "--tiny"])
    checkpoints.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "bare lerp",
        "bare lerp, hashed",
        "nearest, --no-hash",
        "nearest",
        "stochastic, --no-hash",
        "stochastic",
    ]
    assert all("x bare   CPU" in line for line in lines[1:])
