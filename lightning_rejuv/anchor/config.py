"""What a ``config.json`` says about the tensors beside it, and about what they can read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# The parts of a composite config that may describe its text model: those that hold a whole model with a text part
# of its own, those that transformers looks for, those of models that bring their own code.
_TEXT_PARTS = (
    *("thinker_config", "vlm_config"),
    *("text_config", "decoder", "generator", "decoder_config"),
    *("llm_config", "language_config"),
)
# Names under which configurations state the most tokens that a model can read.
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "block_size",
)


def configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config and the configs of its parts (``text_config``, ``vision_config`` …)."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and ("model_type" in value or key in _TEXT_PARTS):
            yield from configs(value)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the text model; the config itself if it has no parts.

    >>> text_config({"audio_config": {"vocab_size": 51}, "text_config": {"vocab_size": 60}})
    {'vocab_size': 60}
    """
    for key in _TEXT_PARTS:
        if isinstance(config.get(key), dict):
            return text_config(config[key])
    return config


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return how many rows a config gives the text model's vocabulary; None if it gives none."""
    for part in (text_config(config), config):
        size = part.get("vocab_size")
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    # A config leaves out what does not differ from the defaults of its kind.
    found = [c["vocab_size"] for c in configs(config) if isinstance(c.get("vocab_size"), int)]
    return found[0] if len(found) == 1 and text_config(config) is config else None


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a config lets the text model read; None if it gives no limit.

    A factor by which rotary positions are stretched multiplies the limit.

    >>> context_length({"max_position_embeddings": 16, "rope_parameters": {"factor": 2.0}})
    32
    """
    text = text_config(config)
    stated = [
        value
        for key in _CONTEXT
        if isinstance(value := text.get(key), int) and not isinstance(value, bool) and value > 0
    ]
    if not stated:
        return None
    limit = stated[0]
    for key in ("rope_parameters", "rope_scaling"):
        for rope in _mappings(text.get(key)):
            original = rope.get("original_max_position_embeddings") or stated[0]
            limit = max(limit, int(original * (rope.get("factor") or 1)))
    return limit


def end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> list[Any] | None:
    """Return the tokens that end a response, as a model's files name them; None if the config does not speak of them.

    Args:
        config: the model's config.
        generation: its generation config. If there is one, it counts alone, and may name none.

    >>> end_tokens({"text_config": {"eos_token_id": 2}}), end_tokens({"eos_token_id": 2}, {"eos_token_id": [2, 7]})
    ([2], [2, 7])
    """
    counted = [config, text_config(config)] if generation is None else [generation]
    said = [part["eos_token_id"] for part in counted if "eos_token_id" in part]
    if not said:
        return None if generation is None else []
    ends: Any = next((ends for ends in said if ends is not None), [])
    return ends if isinstance(ends, list) else [ends]


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a mapping and those inside: some models have other rotary positions for each type of layer."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Return what a config says about tied embeddings; None if it says nothing.

    If several of its parts say something, the outermost counts, as in transformers.
    """
    for part in (config, text_config(config)):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None


def ties(config: Mapping[str, Any]) -> bool | None:
    """Return whether a config ties embeddings: what it says, or else the default of its kind.

    >>> ties({"tie_word_embeddings": False})
    False
    """
    if "tie_word_embeddings" not in config and isinstance(config.get("model_type"), str):
        try:
            from transformers import CONFIG_MAPPING

            return bool(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).tie_word_embeddings)
        except Exception:  # transformers is not installed, does not know the kind, or refuses the config
            return says_tied(config)
    return says_tied(config)


def layers_after_the_last(config: Mapping[str, Any], last: int) -> int:
    """Return how many layers a config puts after the last one for multi-token prediction.

    DeepSeek and others store that module as layers of the model, which transformers leaves out.

    Args:
        config: the config.
        last: index of the model's last layer.

    >>> layers_after_the_last({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, 1)
    1
    """
    for part in configs(config):
        number = part.get("num_nextn_predict_layers")
        if isinstance(number, int) and part.get("num_hidden_layers") == last + 1:
            return number
    return 0
