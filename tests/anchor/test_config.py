from __future__ import annotations

import pytest

from lightning_rejuv.anchor.config import layers_after_the_last, says_tied, text_config, ties, vocabulary_size

_FAMILIES = [
    "aya_vision",
    "blip-2",
    "chameleon",
    "emu3",
    "gemma3",
    "gemma3n",
    "glm4v",
    "granite_speech",
    "idefics2",
    "idefics3",
    "instructblip",
    "internvl",
    "janus",
    "kosmos-2",
    "llama",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "mllama",
    "moshi",
    "musicgen",
    "paligemma",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llava",
    "vipllava",
    "voxtral",
]


@pytest.mark.parametrize("family", _FAMILIES)
def test_the_vocabulary_is_that_of_transformers_own_text_part(family, tmp_path):
    from transformers import CONFIG_MAPPING

    from lightning_rejuv.anchor.files import read_json

    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    try:
        config = CONFIG_MAPPING[family]()
    except Exception as error:
        pytest.skip(f"this transformers makes no {family} by default: {error}")
    text = config.get_text_config(decoder=True)
    text.vocab_size = 77
    config.save_pretrained(tmp_path)
    assert vocabulary_size(read_json(tmp_path / "config.json")) == 77


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 5}, 5),
        ({"audio_config": {"model_type": "a", "vocab_size": 51}, "text_config": {"vocab_size": 60}}, 60),
        ({"vision_config": {"vocab_size": 3}, "llm_config": {"vocab_size": 61}}, 61),
        ({"language_config": {"vocab_size": 62}, "vocab_size": 7}, 62),
        ({"thinker_config": {"text_config": {"vocab_size": 63}, "audio_config": {"vocab_size": 1}}}, 63),
        ({"text_config": {}, "vocab_size": 64}, 64),
        ({"text_config": {}, "audio_config": {"model_type": "a", "vocab_size": 51}}, None),
        ({"hidden_size": 3}, None),
    ],
)
def test_the_vocabulary_is_never_that_of_another_part(config, size):
    assert vocabulary_size(config) == size


def test_tying():
    assert says_tied({"text_config": {"tie_word_embeddings": True}}) is True
    assert says_tied({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}) is False
    assert says_tied({"audio_config": {"model_type": "a", "tie_word_embeddings": True}}) is None
    assert ties({"model_type": "llama"}) is False
    assert ties({"model_type": "gemma"}) is True
    assert ties({"model_type": "own"}) is None
    assert text_config({"a": 1}) == {"a": 1}


def test_layers_after_the_last():
    config = {"text_config": {"num_hidden_layers": 3, "num_nextn_predict_layers": 2}}
    assert layers_after_the_last(config, 2) == 2
    assert layers_after_the_last(config, 3) == 0
    assert layers_after_the_last({"num_hidden_layers": 3}, 2) == 0
