"""Whether calibration batches fit a model: its vocabulary, its context, and what its ``forward`` takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_rejuv._compat import language_model
from lightning_rejuv.anchor.config import context_length as config_context_length
from lightning_rejuv.calibration.batches import TOKENS_A_PASS, Batch, as_batches
from lightning_rejuv.config import WITHOUT_CALIBRATION
from lightning_rejuv.forward import device_of, takes


def batches_for(model: nn.Module, data: Iterable[Any], what: str = "calibration") -> list[Batch]:
    """Check data as :func:`lightning_rejuv.calibration.batches.as_batches` does, and against a model.

    A batch with more tokens than a pass may have becomes several, whose messages name the caller's batch.

    Args:
        model: the language model.
        data: the batches.
        what: how messages name them.

    Returns:
        The batches on the model's device, of at most :data:`~lightning_rejuv.calibration.batches.TOKENS_A_PASS` tokens
        or one row.

    Raises:
        ValueError: as ``as_batches``; or a token lies outside the vocabulary, where on a GPU it would end the
            process; a pair is longer than the model's context; or a tensor that the model takes is not supported.
        TypeError: as ``as_batches``; or the model is a classifier or an encoder-decoder.
    """
    _check_language_model(model)
    batches = as_batches(data, what, TOKENS_A_PASS)
    size, limit = vocabulary_size(model), context_length(model)
    for batch in batches:
        _check_inputs(model, batch)
        low, high = (int(end) for end in batch.inputs["input_ids"].aminmax())
        if size and (low < 0 or high >= size):
            raise ValueError(
                f"Expected the tokens of {batch.where} to lie in the model's vocabulary of {size} but got "
                f"{low if low < 0 else high}. Was it made with this model's tokenizer, and padded with its tokens?"
            )
        longest = int(batch.lengths.max())
        if limit is not None and longest > limit:
            row = batch.rows[int(batch.lengths.argmax())]
            raise ValueError(
                f"Expected prompt and response together to have at most {limit} tokens, the context of "
                f"{type(language_model(model)).__name__}, but row {row} of {batch.where} has {longest}. Leave such "
                "pairs out, or cut off the end of the response."
            )
    return [batch.to(device_of(model)) for batch in batches]


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a language model can read, as its configuration states it.

    A factor by which rotary positions are stretched counts, and learned positions that are kept for padding do not.

    Args:
        model: the model, also with adapters or compiled.

    Returns:
        None if nothing is stated.

    >>> from types import SimpleNamespace
    >>> model = nn.Linear(2, 2)
    >>> model.config = SimpleNamespace(max_position_embeddings=16)
    >>> context_length(model), context_length(nn.Linear(2, 2))
    (16, None)
    """
    inner = language_model(model)
    config = getattr(inner, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    limit = None if text is None else config_context_length(vars(text))
    if limit is None:
        return None
    for name, table in inner.named_modules():
        if (
            "position" in name.rpartition(".")[2]
            and isinstance(table, nn.Embedding)
            and table.padding_idx is not None
        ):
            limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    return limit


def vocabulary_size(model: nn.Module) -> int:
    """Return how many tokens a model has an embedding for; 0 if it tells of no table."""
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return 0
    return int(getattr(table, "num_embeddings", 0))


def _check_language_model(model: nn.Module) -> None:
    name = type(language_model(model)).__name__
    if name.endswith(("Classification", "QuestionAnswering")):
        raise TypeError(
            f"Expected a language model, which returns logits [batch, time, vocabulary], but got {name}. Pass "
            f"{WITHOUT_CALIBRATION}; or `loss` for a reset."
        )
    if getattr(getattr(language_model(model), "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"Expected a decoder-only language model but got {name}, an encoder-decoder. Pass "
            f"{WITHOUT_CALIBRATION}; or `loss` for a reset."
        )


def _check_inputs(model: nn.Module, batch: Batch) -> None:
    name = type(language_model(model)).__name__
    for key in batch.unused:
        if takes(model, key):
            raise ValueError(
                f"Expected {batch.where} to hold text alone but it has a tensor {key!r}, which {name} takes and which "
                "is not supported here. Bring pairs without it, or pass "
                f"{WITHOUT_CALIBRATION}."
            )
    if "position_ids" in batch.inputs and not takes(model, "position_ids"):
        raise ValueError(
            f"Expected the `position_ids` of {batch.where} to count from 0 in each document, as {name}, which takes "
            "none, does, but they do not. Leave them out."
        )
