"""Two threads that work while tensors are computed: one writes and hashes the output, one hashes the inputs."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from lightning_rejuv.anchor.files import ADAPTER_CONFIG, CONFIG, GENERATION, INDEX, hash_file
from lightning_rejuv.checkpoints.output import OPEN_DIRECTORY

_QUEUED = 4
_flush = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
_PATIENCE = 2.0  # seconds
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


class FileWriter:
    """Writes one file after the other in a thread of its own.

    Use it as a context manager. Leaving it waits until everything is on the disk, or, with an error, until the thread
    has closed the files. An error of the thread (a full disk) is raised by the next call.

    An interrupt (Ctrl-C) may end any of these calls anywhere in Python's own code. ``queue.Queue`` does not bear
    that: if an interrupt strikes between the two steps of its ``notify``, the next wake-up is lost, and the thread
    waits for ever for what has been put. The two queues of this class are ``SimpleQueue``, whose ``put`` is one step
    that cannot be interrupted: one brings the thread what it has to write, the other gives back free places.

    Attributes:
        digests: SHA-256 of every file, by name, once it is closed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tasks: SimpleQueue[tuple[str, memoryview] | None] = SimpleQueue()
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(_QUEUED):
            self._places.put(None)
        self._stopped = False
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="lightning-rejuv-writer", daemon=True)
        self.digests: dict[str, str] = {}

    def __enter__(self) -> FileWriter:
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

    def write(self, file: str, content: bytes | Tensor) -> None:
        """Append to a file, which is complete when the next one begins.

        Args:
            file: its name in the directory.
            content: bytes, or a contiguous tensor, which is not kept once it is written.

        Raises:
            OSError: an earlier write failed.
        """
        self._check()
        view = memoryview(content) if isinstance(content, bytes) else _bytes_of(content)
        self._places.get()
        self._tasks.put((file, view))

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _work(self) -> None:
        """Write until there is nothing more to write; after an error give back all places, so that nobody waits."""
        folder = descriptor = -1
        name, digest, pending = "", hashlib.sha256(), 0
        try:
            # The directory itself: not what may stand at its name later.
            folder = os.open(self._directory, OPEN_DIRECTORY)
            while (item := self._next()) is not None and not self._stopped:
                file, view = item
                if file != name:
                    done, descriptor = descriptor, -1
                    self._close(name, done, digest)
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                    descriptor = os.open(file, flags, 0o666, dir_fd=folder)
                    name, digest, pending = file, hashlib.sha256(), 0
                digest.update(view)
                pending += len(view)
                while view:
                    view = view[os.write(descriptor, view) :]
                if pending >= _SYNC_EVERY:
                    _flush(descriptor)
                    pending = 0
                self._places.put(None)
            if not self._stopped:
                done, descriptor = descriptor, -1
                self._close(name, done, digest)
        except BaseException as error:
            self._failed = error
            for _ in range(_QUEUED):  # whoever writes on finds a place, and then the error
                self._places.put(None)
        finally:
            for opened in (descriptor, folder):
                if opened >= 0:
                    os.close(opened)

    def _next(self) -> tuple[str, memoryview] | None:
        while True:
            try:
                return self._tasks.get(timeout=_PATIENCE)
            except Empty:  # an interrupt before the first line of `__exit__` tells the thread nothing
                if not self._directory.exists():
                    return None

    def _close(self, name: str, descriptor: int, digest: hashlib._Hash) -> None:
        if name:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self.digests[name] = digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    # Not every NumPy that is taken declares that its arrays are buffers.
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


class Hasher:
    """Hashes the inputs in a thread of its own while they are used. Use it as a context manager.

    Args:
        inputs: for each role (``"base"``, ``"sft"``) the directory and the names of its weight files.
    """

    def __init__(self, inputs: dict[str, tuple[Path, list[str]]]) -> None:
        self._inputs = inputs
        self._found: dict[str, dict[str, str]] = {role: {} for role in inputs}
        self._stopped = False  # no lock of Python's: an interrupt could end it between its two steps
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="lightning-rejuv-hasher", daemon=True)

    def __enter__(self) -> Hasher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stopped = error is not None
            self._thread.join()
        except BaseException:
            self._stopped = True
            raise

    def report(self) -> dict[str, dict[str, Any]]:
        """Wait for all digests, and return by role the directory and the SHA-256 of every file, by name.

        Raises:
            OSError: a file could not be read.
        """
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return {
            role: {"path": str(directory), "sha256": self._found[role]}
            for role, (directory, _) in self._inputs.items()
        }

    def _work(self) -> None:
        try:
            for role, (directory, weights) in self._inputs.items():
                beside = [name for name in _IDENTIFYING if (directory / name).is_file()]
                for name in (*beside, *weights):
                    if self._stopped:
                        return
                    self._found[role][name] = hash_file(directory / name, lambda: self._stopped)
        except BaseException as error:
            self._failed = error
