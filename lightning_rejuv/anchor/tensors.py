"""Which tensors of a base stand for which of a model: the rules, for names in memory and on disk alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_rejuv.anchor.config import layers_after_the_last

_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embeddings?|shared)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|head)\.weight$")
# Constants that older releases stored and newer ones compute.
_CONSTANT = re.compile(
    r"(?:\.|^)(?:attn|attention|self_attn|self_attention|crossattention)\.(?:bias|masked_bias|causal_mask)$"
    r"|(?:\.|^)(?:\w*inv_freq|embed_positions\.weights|position_ids|masked_bias|attn_bias)$"
    r"|(?:\.|^)rotary_emb\.(?:cos|sin)_cached$"
)
_MULTI_TOKEN_PREDICTION = re.compile(r"(?:^|\.)mtp(?:\.|_)")
_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?(?:layers|h|blocks)\.)(?P<index>\d+)\.")


def is_embedding(name: str) -> bool:
    """Whether a name is a token embedding's.

    >>> is_embedding("model.embed_tokens.weight"), is_embedding("lm_head.weight")
    (True, False)
    """
    return bool(_EMBEDDING.search(name))


def is_head(name: str) -> bool:
    """Whether a name is a language model head's."""
    return bool(_HEAD.search(name))


def is_constant(name: str) -> bool:
    """Whether a name is that of a constant, which some releases store and others compute.

    >>> is_constant("model.layers.0.self_attn.rotary_emb.inv_freq")
    True
    """
    return bool(_CONSTANT.search(name))


def not_of_the_model(
    names: Iterable[str], model: Iterable[str], config: Mapping[str, Any] | None
) -> set[str]:
    """Return those of a base's tensors that are no part of the model that is fused.

    They are constants, and modules for multi-token prediction, which training drops, also if the base stores these
    as layers after the last one.

    Args:
        names: tensors that only the base has.
        model: the model's tensors, by the base's names.
        config: the base's config, if there is one.
    """
    last: dict[str, int] = {}
    for name in model:
        if found := _LAYER.match(name):
            last[found["stack"]] = max(last.get(found["stack"], 0), int(found["index"]))
    return {
        name
        for name in names
        if is_constant(name) or _MULTI_TOKEN_PREDICTION.search(name) or _is_beyond(name, last, config or {})
    }


def _is_beyond(name: str, last: Mapping[str, int], config: Mapping[str, Any]) -> bool:
    found = _LAYER.match(name)
    if not found or found["stack"] not in last:
        return False
    end = last[found["stack"]]
    return 0 < int(found["index"]) - end <= layers_after_the_last(config, end)
