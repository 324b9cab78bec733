"""A file name need not be UTF-8: the recipe that an output holds can be read all the same, and runs again."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from lightning_rejuv.checkpoints import rejuvenate_checkpoint
from lightning_rejuv.cli.main import main
from tests.checkpoints.directories import pair, tensors

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="file names of macOS are UTF-8")

NAME = os.fsdecode(b"models-\xff")


@pytest.mark.parametrize("unnamed", ["base", "sft", "out"])
def test_a_recipe_leaves_out_a_path_that_is_no_utf8(unnamed, tmp_path):
    paths = dict(zip(("base", "sft"), pair(tmp_path), strict=True)) | {"out": tmp_path / "out"}
    renamed = tmp_path / NAME
    if unnamed != "out":
        paths[unnamed].rename(renamed)
    paths[unnamed] = renamed
    report = rejuvenate_checkpoint(**paths, alpha=0.4)
    assert set(report.recipe()) & set(paths) == set(paths) - {unnamed}
    again = ["--out", str(tmp_path / "again")]
    if unnamed != "out":
        again += [f"--{unnamed}", str(renamed)]
    assert main(["rejuvenate", "--config", str(paths["out"] / "rejuvenation.yaml"), *again, "--quiet"]) == 0
    # safetensors reads no file under such a name.
    first, second = tensors(paths["out"].rename(tmp_path / "first")), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
