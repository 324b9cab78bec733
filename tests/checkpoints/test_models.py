"""Configs that would make a model of more parts than any machine holds."""

from __future__ import annotations

import pytest

from lightning_rejuv.checkpoints import verify
from lightning_rejuv.checkpoints.models import load_config, load_tokenizer
from tests.checkpoints.directories import edit_config, pair


@pytest.mark.parametrize("count", [10**9, 10**30, float("inf")])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # Qwen 2's config alone lists its layers
def test_a_config_of_endless_layers_is_refused_at_once(tmp_path, kind, count):
    _, sft = pair(tmp_path)
    edit_config(sft, model_type=kind, num_hidden_layers=count)
    for load in (load_config, load_tokenizer):
        with pytest.raises(ValueError, match=r"`num_hidden_layers` in .* to be at most 10000"):
            load(sft)
    assert "architecture" in {finding.check for finding in verify(sft).findings if finding.ok is False}
