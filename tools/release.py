"""Check a tag against the version, and print what the changelog says of it: ``python -m tools.release v0.1.0``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str, root: Path) -> str:
    """The changelog's section of the version that a tag names.

    Raises:
        SystemExit: If pyproject.toml or CITATION.cff has another version, or the changelog has no section of it.
    """
    for file, pattern in (("pyproject.toml", r'^version = "(.+)"$'), ("CITATION.cff", r"^version: (.+)$")):
        (version,) = re.findall(pattern, (root / file).read_text(), flags=re.M)
        if tag != f"v{version}":
            raise SystemExit(f"Expected the tag to be 'v{version}', which {file} says, but got {tag!r}.")
    changelog = (root / "CHANGELOG.md").read_text()
    section = rf"^## \[{re.escape(version)}\].*?\n(.*?)(?=^## \[|^\[|\Z)"
    found = re.search(section, changelog, flags=re.M | re.S)
    if found is None or not found[1].strip():
        raise SystemExit(
            f"Expected a section `## [{version}]` in CHANGELOG.md but found none. Move *Unreleased* there."
        )
    return found[1].strip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("Usage: python -m tools.release TAG (v0.1.0, say)", file=sys.stderr)
        sys.exit(2)
    print(notes(sys.argv[1], ROOT), end="")
