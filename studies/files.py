"""Files of raw results: whole at every moment, and nothing is lost that others write into them at the same time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMPACT = (",", ":")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other writers of a directory waiting; it is made if it is not there.

    A writer reads a file and replaces it under this lock. Readers need none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def read_seeds(path: Path) -> dict[int, dict[str, Any]]:
    """Read a task's results by seed: what holds for the seed, and its runs by arm under ``arms``.

    The file has one JSON object a line: what holds for a seed, then each run of this seed, with its ``arm``.
    Without a file there are no results.
    """
    contents: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        entry = json.loads(line)
        if "arm" in entry:
            contents[entry.pop("seed")]["arms"][entry.pop("arm")] = entry
        else:
            contents[entry["seed"]] = {**entry, "arms": {}}
    return contents


def seeds_as_lines(contents: Mapping[int, Mapping[str, Any]]) -> str:
    """The text that `read_seeds` reads, in the order of the seeds.

    >>> print(seeds_as_lines({7: {"seed": 7, "base": "1f", "arms": {"hot": {"reward": [0.5, 1]}}}}), end="")
    {"seed":7,"base":"1f"}
    {"seed":7,"arm":"hot","reward":[0.5,1]}
    """
    lines: list[dict[str, Any]] = []
    for seed, content in sorted(contents.items()):
        lines.append({key: value for key, value in content.items() if key != "arms"})
        lines += [{"seed": seed, "arm": arm, **result} for arm, result in content["arms"].items()]
    return "".join(json.dumps(line, separators=COMPACT) + "\n" for line in lines)
