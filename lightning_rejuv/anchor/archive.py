"""The archive that ``torch.save`` writes: no record of it takes more memory than it has on the disk."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO


def check_stored(archive: Path | BinaryIO, size: int) -> None:
    """Refuse an archive whose records are larger than the archive: PyTorch never compresses them.

    Args:
        archive: the file.
        size: how many bytes it has.

    Raises:
        ValueError: records are compressed, or overlap.
        zipfile.BadZipFile: it is no archive.
    """
    with zipfile.ZipFile(archive) as found:
        records = found.infolist()
    if any(record.compress_type for record in records) or sum(r.file_size for r in records) > size:
        raise ValueError("its records are compressed, or overlap")
