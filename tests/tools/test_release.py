"""A tag is refused that is not the version's, and what is announced is the changelog's section."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.release import ROOT, notes

CHANGELOG = """# Changelog

## [Unreleased]

- later

## [0.2.0] - 2026-12-01

### Added

- this

## [0.1.10] - 2026-11-30

- that

[Keep]: somewhere
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def _set(root, version, cited=None):
    (root / "pyproject.toml").write_text(
        f'[project]\nversion = "{version}"\n[tool.mypy]\npython_version = "3.10"\n'
    )
    (root / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited or version}\n")


@pytest.mark.parametrize(
    ("version", "expected"), [("0.2.0", "### Added\n\n- this\n"), ("0.1.10", "- that\n")]
)
def test_what_is_announced(root, version, expected):
    _set(root, version)
    assert notes(f"v{version}", root) == expected


@pytest.mark.parametrize(
    ("tag", "version", "cited", "message"),
    [
        ("v0.2.1", "0.2.0", None, "to be 'v0.2.0', which pyproject.toml says, but got 'v0.2.1'"),
        ("0.2.0", "0.2.0", None, "but got '0.2.0'"),
        ("v0.2.0", "0.2.0", "0.1.0", "to be 'v0.1.0', which CITATION.cff says"),
        ("v0.1.1", "0.1.1", None, r"Expected a section `## \[0.1.1\]` in CHANGELOG.md but found none"),
    ],
)
def test_what_is_refused(root, tag, version, cited, message):
    _set(root, version, cited)
    with pytest.raises(SystemExit, match=message):
        notes(tag, root)


@pytest.mark.parametrize("arguments", [[], ["v0.1.0", "v0.2.0"]])
def test_without_one_tag_it_says_how_it_is_used(arguments):
    command = [sys.executable, "-m", "tools.release", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "Usage: python -m tools.release TAG (v0.1.0, say)\n"
