"""``make study-real``, with an interpreter that only notes what it is asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _make(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make where it writes nothing into the repository."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "VENV"))}
    command = ["make", *arguments, f"VENV={tmp_path / 'env'}"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=plain)


@pytest.fixture
def interpreter(tmp_path):
    """An environment whose interpreter prints its arguments; returns what makes it run a line as well."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def write(script: str) -> None:
        python.write_text(f'#!/bin/sh\necho "$@"\n{script}\n')
        python.chmod(0o755)

    write("exit 0")
    return write


def test_what_every_arm_imports_is_asked_for_before_anything_runs(tmp_path, interpreter):
    done = _make(tmp_path, "study-real")
    asked = done.stdout[: done.stdout.index("pip install")]
    assert {"transformers", "scipy", "matplotlib", "trl"} <= set(re.findall(r"\w+", asked))


@pytest.mark.parametrize("failed", [0, 1])
def test_the_page_is_written_even_if_an_arm_failed(failed, tmp_path, interpreter):
    interpreter(f'case "$*" in *studies.real.run*) exit {failed};; esac')
    done = _make(tmp_path, "study-real")
    assert "-m studies.real.page" in done.stdout.splitlines()
    assert (done.returncode != 0) == bool(failed)
