"""Sampling with a model's own ``generate``: from its distribution as it is, within its context."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import end_tokens, generation_config, language_model
from lightning_rejuv.alpha.line import Sampler
from lightning_rejuv.calibration.batches import IGNORED, Batch
from lightning_rejuv.calibration.checks import context_length, vocabulary_size
from lightning_rejuv.forward import takes
from lightning_rejuv.progress import advance, phase

# A base answers at greater length than it was taught to: so many times the longest calibration response.
_LONGER = 4
_PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def sample_with_generate(batches: list[Batch], seed: int, more_ends: Sequence[int] = ()) -> Sampler:
    """Sample one response to every calibration prompt, with the model's own ``generate``.

    At temperature 1 without truncation; of the model's ``generation_config`` only the end-of-sequence and padding
    tokens count. A response ends with its end-of-sequence token, or unfinished: after four times as many tokens as
    the longest calibration response has, or as the model's context allows. Prompts of one length are sampled
    together, so that none is padded.

    Memory is bounded by the calibration batches as the caller made them: no call of ``generate``, and no pass over what
    it returned, has more rows than the largest of them. Beyond a single row, no batch that is returned has more tokens
    (rows × length) than the largest of them, and no cache of ``generate`` more than four times as many.

    Args:
        batches: calibration batches; a prompt is what comes before the first response token.
        seed: of the samples.
        more_ends: tokens that end a response beside the model's own: the base's, if its weights are in the model.
            Those outside the vocabulary, the model's own too, end nothing, and none does if the model has no
            generation config.

    Returns:
        A sampler, which returns batches with ``input_ids``, ``labels``, which end with the first end-of-sequence
        token, ``attention_mask``, and ``finished`` [B] bool, which responses came to that token: none if the model
        names no such token; without ``finished`` if a ``generate`` of its own stops before its time all the same.
        It raises ValueError if ``generate`` takes or returns something else than that of transformers.
    """
    # Of whole batches, not of the parts that go through a model at a time: a cache takes far less for a token.
    sizes = [batch.whole or (len(batch.response), batch.inputs["input_ids"].numel()) for batch in batches]
    rows, tokens = (max(size) for size in zip(*sizes, strict=True))
    longest = _LONGER * max(int(batch.response.sum(1).max()) for batch in batches)

    def sampler(model: nn.Module) -> list[dict[str, Tensor]]:
        torch.manual_seed(seed)
        limit = context_length(model)
        samples, groups = [], []
        for length, prompts in _by_length(batches).items():
            new = longest if limit is None else min(longest, limit - length)
            together = max(1, min(rows, _LONGER * tokens // (length + new)))
            groups += [(prompts[k : k + together], new) for k in range(0, len(prompts), together)]
        with phase("sampling responses", sum(new for _, new in groups)):
            for prompts, new in groups:
                with _counting_tokens(model, new):
                    samples += _parts(_continued(model, prompts, new, more_ends), tokens)
        return samples

    return sampler


@contextmanager
def _counting_tokens(model: nn.Module, most: int) -> Iterator[None]:
    """Tell of each token of some responses that are sampled together; at the end of ``most``, if there were fewer."""
    left = most

    def count(*_: object) -> None:
        nonlocal left
        if left:
            left -= 1
            advance()

    handle = language_model(model).register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
    advance(left)


def _by_length(batches: list[Batch]) -> dict[int, list[dict[str, Tensor]]]:
    """Return all prompts by their length: ids [T], and what else the model takes for each token."""
    prompts: dict[int, list[dict[str, Tensor]]] = {}
    for batch in batches:
        for row, response in enumerate(batch.response):
            length = int(response.int().argmax()) + 1
            prompts.setdefault(length, []).append(
                {k: v[row, :length] for k, v in batch.inputs.items() if k != "attention_mask"}
            )
    return prompts


def _parts(sample: dict[str, Tensor], tokens: int) -> list[dict[str, Tensor]]:
    """Take a batch apart into such of at most so many tokens, each as wide as its longest response."""
    lengths = sample["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    parts = []
    while len(order):
        # From the longest down: the first one decides the width.
        width = int(lengths[order[-1]])
        count = max(1, tokens // width)
        chosen, order = order[-count:].sort().values, order[:-count]
        parts.append({name: v[chosen, :width] if v.dim() > 1 else v[chosen] for name, v in sample.items()})
    return parts


def _continued(
    model: nn.Module, prompts: list[dict[str, Tensor]], new: int, more_ends: Sequence[int]
) -> dict[str, Tensor]:
    """Sample one response of at most ``new`` tokens to each of some prompts of one length."""
    length = len(prompts[0]["input_ids"])
    names = {name for prompt in prompts for name in prompt if name == "input_ids" or takes(model, name)}
    given = {name: torch.stack([_of(prompt, name, length) for prompt in prompts]) for name in names}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with _plain_generation(model, new, more_ends) as (options, ends):
        full = _generated(model, given, options)
    end = torch.tensor(ends, device=full.device, dtype=full.dtype)
    is_end = torch.isin(full[:, length:], end).int()
    mask = torch.ones_like(full)
    mask[:, length:] = is_end.cumsum(1) - is_end == 0  # the first end itself belongs to the response
    labels = full.masked_fill(mask == 0, IGNORED)
    labels[:, :length] = IGNORED
    sample = {"input_ids": full, "labels": labels, "attention_mask": mask}
    if ends or full.shape[1] - length >= new:
        sample["finished"] = is_end.bool().any(1)
    for name in names - {"input_ids"}:
        count = torch.arange(1, full.shape[1] - length + 1, device=full.device)
        after = given[name][:, -1:] + (count if name == "position_ids" else torch.zeros_like(count))
        sample[name] = torch.cat([given[name], after], dim=1)
    return sample


def _generated(model: nn.Module, given: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """Call ``generate``, and check that it does what that of transformers does: a model may have one of its own.

    Returns:
        [B, > T] integers, which begin with the prompts [B, T].

    Raises:
        ValueError: it takes other arguments, or returns something else.
    """
    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
    prompts = given["input_ids"]
    what = f"the prompts {tuple(prompts.shape)} with new tokens after them, as one integer tensor"
    try:
        inspect.signature(generate).bind(**given, **options)
    except TypeError as error:
        raise _not_as_expected(model, what, f"it takes other arguments ({error})") from error
    except ValueError:  # one that is compiled does not tell
        pass
    full = generate(**given, **options)
    if not isinstance(full, Tensor):
        raise _not_as_expected(model, what, f"it returned {type(full).__name__}")
    rows, length = prompts.shape
    integers = not (full.is_floating_point() or full.is_complex() or full.dtype == torch.bool)
    if not integers or full.dim() != 2 or len(full) != rows or full.shape[1] <= length:
        raise _not_as_expected(model, what, f"it returned shape {tuple(full.shape)} of {full.dtype}")
    if not torch.equal(full[:, :length].to(prompts.device, prompts.dtype), prompts):
        raise _not_as_expected(
            model, what, f"what it returned, {tuple(full.shape)}, does not begin with them"
        )
    return full


def _not_as_expected(model: nn.Module, what: str, got: str) -> ValueError:
    return ValueError(
        f"Expected `generate` of {type(language_model(model)).__name__} to take `input_ids`, `attention_mask` and what "
        f"says how to sample, and to return {what}, as that of transformers does, but {got}. Pass `sampler=` (in a "
        "LightningModule `sample_responses`), a function that takes the model and returns sampled responses as batches "
        "with `input_ids` and `labels`."
    )


def _of(prompt: dict[str, Tensor], name: str, length: int) -> Tensor:
    """Return a prompt's numbers by token; if its batch has none, those that a model takes for granted."""
    if name in prompt:
        return prompt[name]
    device = prompt["input_ids"].device
    return (
        torch.arange(length, device=device)
        if name == "position_ids"
        else torch.zeros_like(prompt["input_ids"])
    )


@contextmanager
def _plain_generation(
    model: nn.Module, new: int, more_ends: Sequence[int]
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Take a model's ``generation_config`` away for a while, but for its end-of-sequence and padding tokens.

    Passing another one is not enough: ``generate`` fills it up from the model's own.

    Yields:
        What ``generate`` takes, and the end-of-sequence tokens.
    """
    own = generation_config(model)
    if own is None:
        yield {**_PLAIN, "max_new_tokens": new}, []
        return
    from transformers import GenerationConfig

    padding, size = own.pad_token_id, vocabulary_size(model)
    named = dict.fromkeys([*end_tokens(model), *more_ends])
    ends = [end for end in named if end >= 0 and (not size or end < size)]
    if not isinstance(padding, int) or padding < 0 or (size and padding >= size):
        padding = (ends or [0])[0]  # some tokenizers bring one that the model has no embedding for
    plain = GenerationConfig(
        **_PLAIN, num_beams=1, max_new_tokens=new, eos_token_id=ends or None, pad_token_id=padding
    )
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = plain
        # Under ZeRO or FSDP `generate` would wait at every token for processes that take no part.
        yield {"generation_config": plain, "synced_gpus": False}, ends
    finally:
        for module, config in zip(holders, kept, strict=True):
            module.generation_config = config
