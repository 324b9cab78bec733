"""Every benchmark runs, on tiny sizes, so that none is broken on the day a GPU is at hand."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What makes each of them small; what they write goes to the folder that is added.
ARGUMENTS = {
    "checkpoints.py": ["--tiny"],
    "end_to_end.py": ["--tiny", "--out"],
    "monitor.py": ["--pairs", "1", "--tokens", "256"],
    "ops.py": ["--tiny", "--out"],
    "rejuvenate.py": ["--size", "tiny", "--repeats", "1", "--tokens", "16", "--device", "cpu"],
    "step_cost.py": ["--rounds", "2", "--block", "1"],
}


def run(name: str, out: Path) -> str:
    arguments = ARGUMENTS[name]
    command = [
        sys.executable,
        f"benchmarks/{name}",
        *arguments,
        *([str(out)] if arguments[-1] == "--out" else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_benchmark_is_forgotten():
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(ARGUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARGUMENTS if "--out" not in ARGUMENTS[name]])
def test_a_benchmark_runs(name, tmp_path):
    assert re.search(r"\d", run(name, tmp_path))


@pytest.mark.slow
def test_the_benchmark_of_the_ops_checks_and_times_every_op(tmp_path):
    run("ops.py", tmp_path)
    with next(tmp_path.glob("*.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"][:2].strip() for row in rows} == {"A", "B", "C", "D", "E", "dr"}
    assert all(float(row["median_ms"]) > 0 for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_whole_calls_measures_every_case(tmp_path):
    run("end_to_end.py", tmp_path)
    rows = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert [row for row in rows if "error" in row] == []
    cases = [row["case"] for row in rows]
    for case in (
        "bare",
        "fusion, stochastic",
        "alpha auto",
        "8 sequences of",
        "monitor: probe",
        "anchor on the CPU",
    ):
        assert any(case in found for found in cases), case


def test_the_script_for_a_gpu_is_bash_and_names_files_that_exist():
    script = ROOT / "benchmarks/gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    for path in re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", script.read_text()):
        assert (ROOT / path).is_file(), path
