"""What PEFT's configuration of an adapter says."""

from __future__ import annotations

from lightning_rejuv.adapters import scale_of


def test_of_two_patterns_that_match_the_first_counts():
    for patterns, expected in (
        ({"q_proj": 2, "layers.0.q_proj": 6}, 0.5),
        ({"layers.0.q_proj": 6, "q_proj": 2}, 1.5),
        ({"v_proj": 6, "q_proj": 2, ".*q_proj": 10}, 0.5),
    ):
        config = {"lora_alpha": 8, "alpha_pattern": patterns}
        assert scale_of(config, "model.layers.0.q_proj", 4, "the adapter") == expected
