"""Every kernel compiles for three GPU generations without spills and with its 16-byte loads."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (Linux: pip install triton)"),
    pytest.mark.skipif(
        HAS_TRITON and Version(version("triton")) < Version("3.7"),
        reason="Triton before 3.7 spills registers",
    ),
]
ROOT = Path(__file__).parents[2]


def run_gate(*arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """A process of its own: it replaces Triton's driver, and must not inherit the interpreter's switch."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = f"""
import sys
from tests.ops import compile_gate
{prelude}
sys.exit(compile_gate.main(sys.argv[1:]))
"""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_compile_without_spills_and_with_wide_loads():
    done = run_gate("80", "90", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  ok\n") == 3 * 33, done.stdout


@pytest.mark.slow
def test_the_gate_sees_spills_and_lost_wide_loads():
    """A tile too large for the registers, and rows whose start no longer falls on 16 bytes."""
    prelude = """
tile = compile_gate.activation.activation_tile
compile_gate.activation.activation_tile = lambda *inputs: {**tile(*inputs), "BT": 64}
cases = compile_gate.cases()
crowded, odd = cases["A bf16"], cases["C bf16"]
odd = odd._replace(arguments=tuple(4095 if isinstance(x, int) and x == 4096 else x for x in odd.arguments))
compile_gate.cases = lambda: {"crowded": crowded, "odd": odd}
"""
    done = run_gate("90", prelude=prelude)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "spills or local memory" in done.stdout
    assert "expected at least 4 16-byte loads in the loop" in done.stdout
