from __future__ import annotations

import pytest
import torch

from lightning_rejuv.checkpoints import rejuvenate_checkpoint, verify
from tests.checkpoints.families import FAMILIES, tiny

# Renamed head, transposed weights, fused and interleaved projections, experts that are fused only in memory,
# dense layers among them, tied heads, state spaces: the rest differs in less.
_QUICK = (
    "llama",
    "gpt2",
    "gpt_neox",
    "falcon",
    "deepseek_v3",
    "mixtral",
    "qwen2_moe",
    "gpt_oss",
    "gemma2",
    "jamba",
)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in _QUICK else pytest.mark.slow) for f in sorted(FAMILIES)]
)
def test_every_parameter_of_the_loaded_fusion_is_the_mean_rounded_once(family, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny(family, 0).save_pretrained(tmp_path / "base")
    tiny(family, 1).save_pretrained(tmp_path / "sft", max_shard_size="30KB")
    directories = (tmp_path / "base", tmp_path / "sft", tmp_path / "out")
    rejuvenate_checkpoint(*directories, alpha=0.5, rounding="nearest")
    base, sft, out = (
        AutoModelForCausalLM.from_pretrained(tmp_path / which, dtype=torch.bfloat16)
        for which in ("base", "sft", "out")
    )
    assert len(list(out.parameters())) > 8
    sft_parameters, base_parameters = dict(sft.named_parameters()), dict(base.named_parameters())
    for name, parameter in out.named_parameters():
        # Some families hold a few parameters in float32 in memory; on disk all are bfloat16 here.
        mean = (0.5 * sft_parameters[name].double() + 0.5 * base_parameters[name].double()).bfloat16()
        assert torch.equal(parameter.bfloat16(), mean), name
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(
        p.name for p in (tmp_path / "sft").glob("*.safetensors")
    )
    assert verify(tmp_path / "out"), verify(tmp_path / "out")


def test_there_are_enough_families():
    assert len(FAMILIES) >= 35
