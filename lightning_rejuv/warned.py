"""Warnings of this library, which a report can hold as well, since nobody may be looking where they are printed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def warn(message: str, stacklevel: int = 1) -> None:
    """Warn as :func:`warnings.warn` does, and tell a :func:`collecting_warnings` block around it.

    Args:
        message: what to say.
        stacklevel: whose line it is about: 1 for the caller's, 2 for that of its caller, and so on.
    """
    collected = _collected.get()
    if collected is not None and message not in collected:
        collected.append(message)
    warnings.warn(message, stacklevel=stacklevel + 1)


@contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """Collect what this library warns of inside the ``with`` block, whatever filters let through; each text once.

    The warnings are raised all the same. Those of other libraries are not collected.

    Yields:
        The warnings so far.

    >>> with warnings.catch_warnings(), collecting_warnings() as told:
    ...     warnings.simplefilter("ignore")
    ...     warn("The labels cover padding.")
    ...     warnings.warn("`torch_dtype` is deprecated.")
    >>> told
    ['The labels cover padding.']
    """
    collected: list[str] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
