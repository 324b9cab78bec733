"""Running a model to look at it, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_watchers: list[Callable[[], object]] = []


@contextmanager
def watching_forwards(watcher: Callable[[], object]) -> Iterator[None]:
    """Have a function called after every :func:`forward_logits`: for a progress bar."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; on exit every module's mode and the global RNGs are as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in modes:
            module.training = training


def forward_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a language model's logits [B, T, V], be its output a tensor or a Hugging Face one.

    Raises:
        TypeError: the model returns neither.
    """
    output = model(**inputs)
    for watcher in _watchers:
        watcher()
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"Expected {type(model).__name__} to return logits, or an output with `logits`, for "
            f"{sorted(inputs)} but got {type(output).__name__}."
        )
    return logits


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter: where its inputs go."""
    return next(model.parameters()).device
