"""A directory that appears whole, under its final name, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Give a directory to write into; on exit it gets its final name in one atomic step.

    What is written goes into ``.NAME.partial`` beside it, under a lock that ends with the process. After an
    error it is removed; after a kill it stays, and the next run for the same name removes it. Files have to
    be synced by whoever writes them; the directories are synced here.

    Args:
        final: the name it gets; must not exist, or be an empty directory.

    Raises:
        FileExistsError: it exists and is not empty.
        BlockingIOError: another process is writing it right now.
        OSError: it cannot be written.
    """
    final = final.absolute()
    check_free(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    lock = _claim(partial)
    try:
        yield partial
        for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
            _sync(folder)
        os.rename(partial, final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_free(final: Path) -> None:
    """Refuse an output name that is taken.

    Raises:
        FileExistsError: it exists and is not an empty directory.
    """
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise FileExistsError(
            f"Expected the output {str(final)!r} not to exist but it does. Nothing is ever overwritten: "
            "remove it or choose another name."
        )


def _claim(partial: Path) -> int:
    """Create the partial directory, emptied of what a killed run left, and return its locked descriptor."""
    while True:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(
                f"Another process is writing into {str(partial)!r}: wait for it, or choose another output."
            ) from None
        # Between opening and locking, its former owner may have renamed it to the final name.
        if partial.exists() and os.path.samestat(os.fstat(descriptor), os.stat(partial)):
            break
        os.close(descriptor)
    for left in partial.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return descriptor


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
