"""Lines of JSON from a file, each with its number; gzip is read as it is."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
# Files that hold tables or text in another form, by their first bytes.
_OTHER_FORMS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x28\xb5\x2f\xfd": "a file compressed with Zstandard",
    b"BZh": "a file compressed with bzip2",
    b"\xfd7zXZ": "a file compressed with xz",
    b"PK\x03\x04": "a ZIP archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    r"""Read a JSONL file: where each value stands, for messages, and the value; blank lines are passed over.

    A line ends at ``\n`` or ``\r\n`` and nowhere else: U+2028, U+0085 and their like are characters of a string,
    and so is a control character that is not escaped. A byte order mark before the first line is passed over.

    Raises:
        ValueError: a line is no JSON or no UTF-8, with its number; or the file has another form.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.peek(8)[:8]  # a pipe (`<(head sft.jsonl)`) cannot be rewound
        for first, form in _OTHER_FORMS.items():
            if start.startswith(first):
                raise ValueError(
                    f"Expected {str(path)!r} to be JSONL (UTF-8, one JSON object a line, may be gzip) but it is "
                    f"{form}. Convert it."
                )
        if start.startswith(_GZIP):
            yield from _unpacked(path, file)
        else:
            yield from _values(path, file)


def _unpacked(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(file) as unpacked:
            yield from _values(path, unpacked)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {str(path)!r} to be a whole gzip file but it is damaged: {error}."
        ) from error


def _values(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            yield where, json.loads(line.decode("utf-8"), strict=False)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Expected {where} to be UTF-8 but its byte {error.start} is not ({error.reason})."
            ) from error
        except (ValueError, RecursionError) as error:
            hint = " The file holds one JSON array; write one object a line." if line.strip() == b"[" else ""
            raise ValueError(f"Expected {where} to be JSON: {error}.{hint}") from error
