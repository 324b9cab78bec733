"""What a fusion needs beside the model: one tensor, or this process's shard of one; never a second model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# How many weights of a layer, of which the model has eight, a fusion may take.
LIMITS = {
    "whole": 1.0,
    "fsdp2": 0.5,
    "fsdp1": 2.0,  # a gathered unit, and a copy of it on the way
}
# Every large block is mapped by itself and given back at once; else glibc keeps some, as it sees fit.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
LAYER = {"float32": 16, "bfloat16": 8}  # megabytes


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux to tell how much memory is used"
)
@pytest.mark.parametrize("layout", LIMITS)
@pytest.mark.parametrize("dtype", LAYER)
def test_a_fusion_never_holds_a_second_model(layout, dtype):
    command = [sys.executable, "-m", "tests.weights.fusion_memory", layout, dtype]
    root, environment = Path(__file__).parents[2], {**os.environ, **MALLOC}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    for growth in json.loads(done.stdout.splitlines()[-1]):
        assert growth < LIMITS[layout] * LAYER[dtype] + 4, f"{growth:.1f} MB"
