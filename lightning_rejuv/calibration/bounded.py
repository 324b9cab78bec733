"""Reading batches that may have no end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from lightning_rejuv.warned import warn

# A few dozen responses will do. What has a length is taken at its word much further than what has none.
MAX_RESPONSES, MAX_STREAMED = 4096, 128

T = TypeVar("T")


def most_read(batches: Iterable[Any]) -> int:
    """Return after how many responses no further batch is read: fewer if there is no length, and perhaps no end.

    >>> most_read([1, 2]), most_read(iter([1, 2]))
    (4096, 128)
    """
    try:
        len(batches)  # type: ignore[arg-type]
    except (
        TypeError,
        NotImplementedError,
    ):  # a DataLoader has the method, also where its dataset has no length
        return MAX_STREAMED
    return MAX_RESPONSES


def check_batches(batches: Any, what: str) -> None:
    """Refuse what is no iterable of batches: one batch, a path, nothing.

    Args:
        batches: what was passed, or what a sampler returned.
        what: how the message names it.

    Raises:
        TypeError: with what to do.

    >>> check_batches({"input_ids": [[1, 2]]}, "calibration")
    Traceback (most recent call last):
    ...
    TypeError: Expected the calibration data to be an iterable of batches but got one dict. Put it into a list.
    """
    one = isinstance(batches, Mapping)
    # Many a dataset has no `__iter__`, and is iterated over by its items all the same.
    iterates = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if one or not iterates or isinstance(batches, (str, bytes)):
        raise TypeError(
            f"Expected the {what} data to be an iterable of batches but got "
            f"{'one ' if one else ''}{type(batches).__name__}.{' Put it into a list.' if one else ''}"
        )


def bounded(batches: Iterable[T], what: str, most: int, size: Callable[[T], int]) -> Iterator[T]:
    """Yield batches until they hold so many responses; a warning says so if there are more.

    Args:
        batches: the batches, perhaps without end.
        what: how the warning names them.
        most: with how many responses no further batch is read.
        size: how many one of them holds.
    """
    read = 0
    for batch in batches:
        if read >= most:
            warn(
                f"The {what} data hold more than {read} responses; the first {read} are used and the rest is not read. "
                f"A few dozen responses will do; of batches in a list up to {MAX_RESPONSES} are used.",
                stacklevel=3,
            )
            return
        yield batch
        read += size(batch)
