"""The recipe that stands beside the weights: run again, it writes the same weights."""

from __future__ import annotations

import pytest
import torch
import yaml

from lightning_rejuv.cli.main import main
from tests.checkpoints.directories import fuse, pair, tensors


@pytest.mark.parametrize("alpha", [0.0, 0, {"*": 0.0}, 1.0], ids=repr)
def test_an_alpha_at_either_end_is_in_the_recipe_and_makes_the_same_again(alpha, tmp_path):
    base, sft = pair(tmp_path)
    out, _ = fuse(base, sft, alpha=alpha)
    recipe = yaml.safe_load((out / "rejuvenation.yaml").read_text())
    assert recipe["alpha"] == alpha
    assert type(recipe["alpha"]) is (dict if isinstance(alpha, dict) else float)
    again = ["rejuvenate", "--config", str(out / "rejuvenation.yaml"), "--out", str(tmp_path / "again")]
    assert main([*again, "--quiet"]) == 0
    first, second, source = tensors(out), tensors(tmp_path / "again"), tensors(sft if alpha == 1.0 else base)
    assert first.keys() == second.keys() == source.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, source[name]), name
        assert torch.equal(tensor, second[name]), name


def test_options_that_nothing_was_done_with_are_not_in_the_recipe(tmp_path):
    base, sft = pair(tmp_path)
    out, report = fuse(base, sft, alpha=0.0)
    recipe = yaml.safe_load((out / "rejuvenation.yaml").read_text())
    assert recipe == {
        **{"base": str(base), "sft": str(sft), "out": str(out)},
        **{"alpha": 0.0, "rounding": "stochastic", "seed": 0, "hashes": True},
    }
    assert report.options["calibration"] is report.options["dtype"] is None
