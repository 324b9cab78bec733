"""Where a file of a checkpoint directory really lies."""

from __future__ import annotations

from pathlib import Path


def lies_within(directory: Path, name: str | Path) -> bool:
    """Whether a file that a directory holds, or links to, is the directory's own.

    In the Hugging Face Hub's cache a revision's files are links into the ``blobs`` of the same repository; these
    count as its own. A link that leads anywhere else, to nothing or in a circle does not.

    Args:
        directory: the checkpoint.
        name: of the file, relative to it.

    >>> lies_within(Path("."), "../elsewhere.json")
    False
    """
    try:
        root = directory.resolve(strict=True)
        file = (root / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # nothing there; a circle; a null character
        return False
    if file.is_relative_to(root):
        return True
    repository = root.parent.parent
    # Not resolved any further: `blobs` that are a link themselves lead out of the repository.
    return root.parent.name == "snapshots" and file.parent == repository / "blobs"
