"""Threads that work while tensors are computed: one writes and hashes the output, one for each input hashes it."""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_rejuv.anchor.files import ADAPTER_CONFIG, CONFIG, GENERATION, INDEX, hash_file
from lightning_rejuv.checkpoints.output import OPEN_DIRECTORY
from lightning_rejuv.checkpoints.reader import Seen

_QUEUED = 4
_flush = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
_PATIENCE = 2.0  # seconds
_READ = 1 << 20  # bytes that are read at a time for a digest alone
# Bytes between two syncs: the disk then works while tensors are computed, not after the last one.
_SYNC_EVERY = 64 << 20
# Files beside the weights that tell a checkpoint from another.
_IDENTIFYING = (
    CONFIG,
    INDEX,
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    ADAPTER_CONFIG,
)


_Task = TypeVar("_Task")


class _Thread(ABC, Generic[_Task]):
    """Does one task after the other in a thread of its own.

    Use it as a context manager. Leaving it waits until everything is done, or, with an error, until the thread has
    closed its files. An error of the thread (a full disk) is raised by the next call.

    An interrupt (Ctrl-C) may end any of these calls anywhere in Python's own code. ``queue.Queue`` does not bear
    that: if an interrupt strikes between the two steps of its ``notify``, the next wake-up is lost, and the thread
    waits for ever for what has been put. The two queues of this class are ``SimpleQueue``, whose ``put`` is one step
    that cannot be interrupted: one brings the thread its tasks, the other gives back free places.

    Args:
        directory: the output while it is written; once it is gone there is nothing more to do.
        name: of the thread.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(_QUEUED):
            self._places.put(None)
        self._stopped = False
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        try:
            self._thread.start()
        except BaseException:
            self._stopped = True
            self._tasks.put(None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stopped = error is not None
            self._tasks.put(None)
            self._thread.join()
        except BaseException:
            self._stopped = True
            self._tasks.put(None)
            self._thread.join(_PATIENCE)  # so that it lets go of the files before they are removed
            raise
        if error is None:
            self._check()

    @abstractmethod
    def _work(self) -> None:
        """Do what :meth:`_given` yields."""

    def _put(self, task: _Task) -> None:
        self._check()
        self._places.get()
        self._tasks.put(task)

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failed = error
            for _ in range(_QUEUED):  # whoever puts on finds a place, and then the error
                self._places.put(None)

    def _given(self) -> Iterator[_Task]:
        """Yield tasks until there are no more; the place of each is free once the next one is asked for."""
        while (task := self._next()) is not None and not self._stopped:
            yield task
            self._places.put(None)

    def _next(self) -> _Task | None:
        while True:
            try:
                return self._tasks.get(timeout=_PATIENCE)
            except Empty:  # an interrupt before the first line of `__exit__` tells the thread nothing
                if not self._directory.exists():
                    self._stopped = True
                    return None


class FileWriter(_Thread[tuple[str, memoryview]]):
    """Writes one file after the other in a thread of its own, and leaves its context once all are on the disk.

    Args:
        directory: where to.
        hashes: whether files are hashed.

    Attributes:
        digests: SHA-256 of every file, by name, once it is closed; None if files are not hashed.
    """

    def __init__(self, directory: Path, hashes: bool = True) -> None:
        super().__init__(directory, "lightning-rejuv-writer")
        self._hashes = hashes
        self.digests: dict[str, str | None] = {}

    def write(self, file: str, content: bytes | Tensor) -> None:
        """Append to a file, which is complete when the next one begins.

        Args:
            file: its name in the directory.
            content: bytes, or a contiguous tensor, which is not kept once it is written.

        Raises:
            OSError: an earlier write failed.
        """
        self._put((file, memoryview(content) if isinstance(content, bytes) else _bytes_of(content)))

    @override
    def _work(self) -> None:
        folder = descriptor = -1
        name, digest, pending = "", self._new_digest(), 0
        try:
            # The directory itself: not what may stand at its name later.
            folder = os.open(self._directory, OPEN_DIRECTORY)
            for file, view in self._given():
                if file != name:
                    done, descriptor = descriptor, -1
                    self._close(name, done, digest)
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                    descriptor = os.open(file, flags, 0o666, dir_fd=folder)
                    name, digest, pending = file, self._new_digest(), 0
                if digest is not None:
                    digest.update(view)
                pending += len(view)
                while view:
                    view = view[os.write(descriptor, view) :]
                if pending >= _SYNC_EVERY:
                    _flush(descriptor)
                    pending = 0
            if not self._stopped:
                done, descriptor = descriptor, -1
                self._close(name, done, digest)
        finally:
            for opened in (descriptor, folder):
                if opened >= 0:
                    os.close(opened)

    def _new_digest(self) -> hashlib._Hash | None:
        return hashlib.sha256() if self._hashes else None

    def _close(self, name: str, descriptor: int, digest: hashlib._Hash | None) -> None:
        if name:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self.digests[name] = None if digest is None else digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    # Not every NumPy that is taken declares that its arrays are buffers.
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


class Hasher:
    """Hashes the inputs, each in a thread of its own, while they are used. Use it as a context manager.

    Args:
        directory: the output while it is written.
        inputs: for each role (``"base"``, ``"sft"``) the directory and the names of its weight files.
        read: the roles whose weight files are read meanwhile, with :meth:`seen` told of it: those are hashed from what
            was read. All other files are read for their hash.
        hashes: whether files are hashed at all.
    """

    def __init__(
        self,
        directory: Path,
        inputs: dict[str, tuple[Path, list[str]]],
        read: Container[str] = (),
        hashes: bool = True,
    ) -> None:
        self._inputs = inputs
        self._threads = {
            role: _InputHasher(directory, root, weights, role in read)
            for role, (root, weights) in (inputs if hashes else {}).items()
        }
        self._running = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for thread in self._threads.values():
                stack.enter_context(thread)
            self._running = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.__exit__(kind, error, trace)

    def seen(self, role: str) -> Seen | None:
        """Return what is to be told whatever is read of an input; None if nothing is."""
        thread = self._threads.get(role)
        return None if thread is None else thread.seen

    def report(self) -> dict[str, dict[str, Any]]:
        """Wait for all digests, and return by role the directory and the SHA-256 of every file, by name.

        Instead of the digests of files that are not hashed there is None.

        Raises:
            OSError: a file could not be read.
        """
        digests = {role: thread.finish() for role, thread in self._threads.items()}
        return {
            role: {"path": str(root), "sha256": digests.get(role)} for role, (root, _) in self._inputs.items()
        }


class _InputHasher(_Thread[tuple[str, int, memoryview]]):
    """Hashes the files of one directory that identify a checkpoint, and its weight files."""

    def __init__(self, directory: Path, root: Path, weights: list[str], read: bool) -> None:
        super().__init__(directory, "lightning-rejuv-hasher")
        self._root, self._weights = root, weights
        self._end = dict.fromkeys(weights if read else (), 0)  # of what was passed on of each file
        self._fills = False  # whether the thread reads what was not passed on
        self._found: dict[str, str] = {}

    def seen(self, file: str, offset: int, content: memoryview) -> None:
        """Take what was read of a weight file, which must not be changed any more.

        Args:
            file: its name.
            offset: the place of the first byte in the file.
            content: the bytes.

        Raises:
            OSError: a file could not be read.
        """
        # Nobody waits for a thread that is far behind: it reads on its own what it is not given.
        if offset >= self._end[file] and not (self._fills and self._places.empty()):
            self._put((file, offset, content))
            self._end[file] = offset + len(content)

    def finish(self) -> dict[str, str]:
        """Wait for the digests, and return them by name."""
        self._tasks.put(None)
        self._thread.join()
        self._check()
        return self._found

    @override
    def _work(self) -> None:
        beside = [name for name in _IDENTIFYING if (self._root / name).is_file()]
        for name in (*beside, *(name for name in self._weights if name not in self._end)):
            if self._stopped:
                return
            self._found[name] = hash_file(self._root / name, lambda: self._stopped)
        digests = {name: (hashlib.sha256(), 0) for name in self._end}
        for name, offset, content in self._given():
            digest, end = digests[name]
            self._fill(name, digest, end, offset)
            digest.update(content)
            digests[name] = digest, offset + len(content)
        for name, (digest, end) in digests.items():
            self._fill(name, digest, end, os.stat(self._root / name).st_size)
            self._found[name] = digest.hexdigest()

    def _fill(self, name: str, digest: hashlib._Hash, start: int, stop: int) -> None:
        """Hash a part of a file that was not passed on: the header, or what nobody reads or reads in another order."""
        if start == stop:
            return
        self._fills = True
        with open(self._root / name, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop and not self._stopped:
                block = file.read(min(_READ, stop - start))
                if not block:
                    raise OSError(f"{str(self._root / name)!r} ended early: it was changed while read.")
                digest.update(block)
                start += len(block)
        self._fills = False
