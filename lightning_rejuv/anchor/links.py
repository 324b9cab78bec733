"""Where a file of a checkpoint directory really lies."""

from __future__ import annotations

import re
from pathlib import Path

# A repository in the Hugging Face Hub's cache, and a file in the store that the repositories of a cache share.
_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.+")
_SHARED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")


def lies_within(directory: Path, name: str | Path) -> bool:
    """Whether a file that a directory holds, or links to, is the directory's own.

    In the Hugging Face Hub's cache the files of a revision are links into the ``blobs`` of the same repository, and
    these may be links into the ``blobs`` of the cache: both count as its own. A link that leads anywhere else, to
    nothing or in a circle does not.

    Args:
        directory: the checkpoint.
        name: of the file, relative to it.

    >>> lies_within(Path("."), "../elsewhere.json")
    False
    """
    try:
        root = directory.resolve(strict=True)
        file = (root / name).resolve(strict=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # there is no such file; links form a circle; a null character
        return False
    if file.is_relative_to(root):
        return True
    revisions = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    if revisions is None or not _REPOSITORY.fullmatch(revisions.parent.name):
        return False
    # This is not resolved any further: `blobs` that are a link themselves lead out.
    repository = revisions.parent
    store = repository.parent / "blobs"
    shared = file.is_relative_to(store) and _SHARED.fullmatch(file.relative_to(store).as_posix())
    return file.parent == repository / "blobs" or bool(shared)
