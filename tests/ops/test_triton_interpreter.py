"""The conformance suite on Triton's interpreter: the kernels' arithmetic, without a GPU.

Triton reads ``TRITON_INTERPRET`` when a kernel is decorated, so it takes a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = ["test_conformance.py", "test_conformance_tokens.py", "test_conformance_lerp.py"]
EDITS = ["../weights/test_edit.py", "../test_stochastic_rounding.py", "../test_apply_plan.py"]


def release(package: str) -> tuple[int, int]:
    """Major and minor version, (0, 0) where the package is missing."""
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


pytestmark = [
    pytest.mark.skipif(
        release("triton") < (3, 7) and release("numpy") >= (2, 4),
        reason="the interpreter of Triton before 3.7 does not work with numpy 2.4 or later (triton issue 9171)",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="Triton is not installed (Linux: pip install triton)",
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreted one already"
    ),
]


def run_interpreted(*options: str, suites: list[str] = SUITES) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *suites]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_conform_in_the_interpreter():
    assert "triton interpreter" in run_interpreted("-v")


@pytest.mark.slow
def test_kernels_conform_in_the_interpreter_on_every_combination():
    assert "triton interpreter" in run_interpreted("-v", "-m", "slow")


@pytest.mark.slow
def test_edits_by_the_kernels_are_what_they_are_without():
    assert " passed" in run_interpreted("-p", "tests.ops.interpreted_edits", suites=EDITS)
