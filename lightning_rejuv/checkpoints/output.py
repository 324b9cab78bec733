"""The output directory, which appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

REPORT = "rejuvenation.json"
RECIPE = "rejuvenation.yaml"
CARD = "README.md"

# Opens a directory, never through a link, and never waits: a FIFO is no directory.
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Give a directory to write into; on exit it gets its final name in one atomic step.

    What is written goes into ``.NAME.partial`` beside it, under a lock that ends with the process. After an
    error it is removed; after a kill it stays, and the next run for the same name removes it. A link at that name,
    or anything else that is no directory of the same user, is neither followed nor removed. Whoever writes a file
    has to sync it; this function syncs the directories.

    Args:
        final: the name that the directory gets; it must not exist, or be an empty directory.

    Raises:
        FileExistsError: the name is taken; or something else stands at the partial directory's name.
        BlockingIOError: another process is writing the same output right now.
        OSError: the directory cannot be written.
    """
    final = final.absolute()
    check_free(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    lock = _claim(partial)
    try:
        try:
            yield partial
            _sync(lock)
            _check_same(partial, lock)
            os.rename(partial, final)
            parent = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except BaseException:
            _remove(partial, final, lock)
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


def check_apart(out: Path, *inputs: Path) -> None:
    """Refuse an output inside of an input.

    Raises:
        ValueError: with both paths.
    """
    for path in inputs:
        real = Path(os.path.realpath(out))  # of links in a circle, too, which `mkdir` then names
        if Path(os.path.realpath(path)) in (real, *real.parents):
            raise ValueError(f"Expected the output {str(out)!r} to lie outside of the input {str(path)!r}.")


def check_room(out: Path, needed: int) -> None:
    """Refuse to begin if the disk cannot hold the output.

    Raises:
        OSError: with what is needed and what is free.
    """
    existing = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"Expected {needed / 2**30:.2f} GiB free at {str(existing)!r} for the output but there are "
            f"{free / 2**30:.2f} GiB."
        )


def _claim(partial: Path) -> int:
    """Create the partial directory, emptied of what a killed run left, and return its locked descriptor."""
    while True:
        created = True
        try:
            os.mkdir(partial)
        except FileExistsError:
            created = False
        try:
            descriptor = os.open(partial, OPEN_DIRECTORY)
        except FileNotFoundError:  # its former owner has just renamed it
            continue
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise _taken(partial, "a link or a file") from error
        locked = False
        try:
            if not created and os.fstat(descriptor).st_uid != os.geteuid():
                raise _taken(partial, "another user's directory")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"Another process is writing into {str(partial)!r}: wait for it, or choose another output."
                ) from None
            locked = True
            # Between opening and locking, its former owner may have renamed it to the final name.
            if _is_same(partial, descriptor):
                _empty(descriptor)
                return descriptor
        except BaseException:
            if locked and created and _is_same(partial, descriptor):
                os.rmdir(partial)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _taken(partial: Path, what: str) -> FileExistsError:
    return FileExistsError(
        f"Expected {str(partial)!r}, where the output is prepared, not to exist or to be what a run that was "
        f"stopped has left, but it is {what}. Nothing there is touched: remove it, or choose another output."
    )


def _is_same(path: Path, descriptor: int) -> bool:
    """Tell whether a path, itself no link, is the directory that is open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check_same(partial: Path, lock: int) -> None:
    if not _is_same(partial, lock):
        raise OSError(f"{str(partial)!r} was moved or replaced while the output was written into it.")


def _remove(partial: Path, final: Path, lock: int) -> None:
    """Empty the directory, even if an interrupt or an error comes in between; then remove it, under either name."""
    try:
        _empty(lock)
    except BaseException:  # a second Ctrl-C, or an error of the disk: once more, as far as it goes
        with contextlib.suppress(OSError):
            _empty(lock)
    for path in (partial, final):
        with contextlib.suppress(OSError):
            if _is_same(path, lock):
                os.rmdir(path)


def _empty(folder: int) -> None:
    """Remove everything in a directory that is open; links are removed and never followed."""
    for name in os.listdir(folder):
        try:
            inner = os.open(name, OPEN_DIRECTORY, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            os.unlink(name, dir_fd=folder)
            continue
        try:
            _empty(inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=folder)


def _sync(folder: int) -> None:
    """Wait until a directory that is open, and those in it, are on the disk."""
    with os.scandir(folder) as entries:
        inside = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in inside:
        inner = os.open(name, OPEN_DIRECTORY, dir_fd=folder)
        try:
            _sync(inner)
        finally:
            os.close(inner)
    os.fsync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a small new file and wait until it is on the disk; a link that stands at its name is not followed."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
