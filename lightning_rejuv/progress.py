"""Which phase a long computation is in, and how much of it is done: for progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Listener = Callable[[str, int, int], object]
"""Called with the name of a phase, how much of it is done, and how much there is: bytes, forward passes or tokens."""


@dataclass
class _Phase:
    name: str
    total: int
    done: int = 0


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_phase: ContextVar[_Phase | None] = ContextVar("phase", default=None)


@contextmanager
def reporting(listener: Listener | None) -> Iterator[None]:
    """Have a function told of the progress of everything that is computed inside the ``with`` block.

    What it raises ends the computation.

    Args:
        listener: see :data:`Listener`; None leaves the one of an outer block.

    >>> seen = []
    >>> with reporting(lambda *step: seen.append(step)):
    ...     with phase("adding up", 2):
    ...         advance()
    ...     advance()  # outside of a phase: nobody is told
    >>> seen
    [('adding up', 0, 2), ('adding up', 1, 2), ('adding up', 2, 2)]
    """
    token = _listener.set(listener or _listener.get())
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def phase(name: str, total: int) -> Iterator[None]:
    """Name what is computed inside the ``with`` block; what is done of it is told by :func:`advance`.

    A phase inside another is a part of it, and has no name of its own; nor has one in which nothing is to be done. At
    its end a phase is complete, also if less had to be done than was thought.

    Args:
        name: what is done, in words that stand before a progress bar.
        total: how much there is to do at most.
    """
    if _phase.get() is not None or not total:
        yield
        return
    current = _Phase(name, total)
    token = _phase.set(current)
    try:
        _tell(current)
        yield
        if current.done < total:
            current.done = total
            _tell(current)
    finally:
        _phase.reset(token)


def advance(more: int = 1) -> None:
    """Say that so much more of the current phase is done; outside of one it says nothing."""
    current = _phase.get()
    if current is not None:
        current.done = min(current.done + more, current.total)
        _tell(current)


def _tell(current: _Phase) -> None:
    listener = _listener.get()
    if listener is not None:
        listener(current.name, current.done, current.total)
