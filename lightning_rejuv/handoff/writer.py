"""Writes weight files while the next tensor is computed: one thread, a short queue, synced and hashed."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_QUEUED = 4
_flush = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
# Bytes between two syncs: the disk then works while tensors are computed, not after the last one.
_SYNC_EVERY = 64 << 20


class FileWriter:
    """Writes one file after the other in a thread of its own.

    A context manager; leaving it waits until everything is on the disk. An error of the thread (a full disk)
    is raised by the next call.

    Attributes:
        digests: SHA-256 of every file, by name, once it is closed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._queue: queue.Queue[tuple[str, memoryview] | None] = queue.Queue(_QUEUED)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="lightning-rejuv-writer", daemon=True)
        self.digests: dict[str, str] = {}

    def __enter__(self) -> FileWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._check()

    def write(self, file: str, content: bytes | Tensor) -> None:
        """Append to a file; a file is complete when the next one begins. Contiguous tensors, not kept.

        Raises:
            OSError: an earlier write failed.
        """
        self._check()
        view = memoryview(content) if isinstance(content, bytes) else _bytes_of(content)
        self._queue.put((file, view))

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _work(self) -> None:
        name, descriptor, digest, pending = "", -1, hashlib.sha256(), 0
        try:
            while (item := self._queue.get()) is not None:
                file, view = item
                if file != name:
                    self._close(name, descriptor, digest)
                    descriptor = os.open(self._directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                    name, digest, pending = file, hashlib.sha256(), 0
                digest.update(view)
                pending += len(view)
                while view:
                    view = view[os.write(descriptor, view) :]
                if pending >= _SYNC_EVERY:
                    _flush(descriptor)
                    pending = 0
            self._close(name, descriptor, digest)
        except BaseException as error:
            self._failed = error
            if descriptor >= 0:
                os.close(descriptor)
            while self._queue.get() is not None:  # whoever puts must never wait for a dead thread
                pass

    def _close(self, name: str, descriptor: int, digest: hashlib._Hash) -> None:
        if name:
            os.fsync(descriptor)
            os.close(descriptor)
            self.digests[name] = digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
