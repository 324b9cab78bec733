"""Where a written checkpoint comes from: hashes of what went in, and the SHA-256 of what came out."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lightning_rejuv.checkpoints.checkpoint import CONFIG, INDEX

_BLOCK = 1 << 20
_IDENTIFYING = (
    CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "adapter_config.json",
)


def hash_file(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return a file's SHA-256 in hexadecimal: what ``sha256sum`` prints and the Hugging Face Hub shows."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while (block := file.read(_BLOCK)) and not stopped():
            digest.update(block)
    return digest.hexdigest()


class Hasher:
    """Hashes the inputs in a thread of its own while they are used; a context manager.

    Args:
        inputs: for each role its directory and the names of its weight files.
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

    def digests(self) -> dict[str, dict[str, str]]:
        """Wait for the SHA-256 of every file, by role and name.

        Raises:
            OSError: a file could not be read.
        """
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._found

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
