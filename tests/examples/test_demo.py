from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.sft_to_rl import demo, training
from examples.sft_to_rl.evaluate import evaluate


@pytest.fixture
def _own_process_settings():
    """The demo sets them for its process; other tests should not inherit them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("_own_process_settings")
def test_miniature_end_to_end(tmp_path, monkeypatch, capsys):
    """Every stage of both tasks, in one process; then again with the cached bases."""
    evaluated = []

    def spy(model, task, split, *sizes, seed):
        evaluated.append((split, {name: weight.clone() for name, weight in model.state_dict().items()}))
        return evaluate(model, task, split, *sizes, seed=seed)

    monkeypatch.setattr(training, "evaluate", spy)
    arguments = ["--miniature", "--seeds", "1", "--first-seed", "901", "--workers", "1", "--tasks"]
    directories = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    summary = demo.main([*arguments, "retail_desk", *directories])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["miniature"] is True
    assert summary["rl_budget"] == 2 * 4 * 4
    assert summary["tasks"]["retail_desk"]["seed_numbers"] == [901]
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert "nothing was learned" in capsys.readouterr().out

    # Four arms, each evaluated in and out of distribution before and after.
    assert [split for split, _ in evaluated] == ["id", "ood"] * 8
    (base_directory,) = (tmp_path / "cache").iterdir()
    checkpoints = tmp_path / "out" / "checkpoints" / "retail_desk" / "seed_901"
    base = load_file(base_directory / "model.safetensors")
    modsft, oversft = (load_file(checkpoints / name / "model.safetensors") for name in ("modsft", "oversft"))
    starts = [weights for _, weights in evaluated[::4]]
    for start, weights in zip(starts, (base, modsft, oversft), strict=False):
        assert all(torch.equal(start[name], weights[name]) for name in weights)

    # The rejuvenated arm was evaluated after the edit, before the first update: fused, or reset to the base.
    rejuvenation = summary["arms"]["rejuvenated"]["per_seed"][0]["rejuvenation"]
    alpha, reset = rejuvenation["alpha"], 0
    for name, weight in starts[3].items():
        fused = alpha * oversft[name] + (1 - alpha) * base[name]
        is_fused = torch.isclose(weight, fused, atol=1e-6, rtol=1e-5)
        assert bool((is_fused | (weight == base[name])).all()), name
        reset += int((~is_fused).sum())
    assert reset > 0
    neurons = 2 * (4 * 64 + 3 * 176)  # q, k, v, o and gate, up, down of two layers
    assert rejuvenation["neurons_reset"] == round(0.02 * neurons)

    events = tmp_path / "out" / "tensorboard" / "retail_desk" / "seed_901"
    stages = {"pretrain", "sft", "base", "modsft", "oversft", "rejuvenated"}
    assert {path.name for path in events.iterdir()} == stages
    assert (events / "rejuvenated" / "rejuvenation.json").is_file()
    accumulator = EventAccumulator(str(events / "rejuvenated"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    names = ["reward", "pass_at_k", "zero_variance_groups", "entropy", "grad_norm", "update_norm"]
    assert {f"rl/{name}" for name in names} <= tags
    assert {"plasticity/token_entropy", "plasticity/relative_drift"} <= tags
    assert len(accumulator.Scalars("rl/reward")) == 2

    again = demo.main([*arguments, "retail_desk", *directories])
    assert "base: found in" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 1
    first, second = (s["arms"]["rejuvenated"]["per_seed"][0] for s in (summary, again))
    assert first["curves"] == second["curves"]
    assert {path.name for path in events.iterdir()} == stages
    assert len(list((events / "base").glob("events.*"))) == 1  # not on top of the first run's


@pytest.mark.usefixtures("_own_process_settings")
def test_miniature_of_the_second_task(tmp_path):
    directories = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    options = ["--miniature", "--seeds", "1", "--first-seed", "901", "--workers", "1"]
    summary = demo.main([*options, "--tasks", "running_total", *directories])
    assert summary["task"] == "running_total"
    assert set(summary["arms"]) == {"base", "modsft", "oversft", "rejuvenated"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "chess"], "Expected --tasks to name some of retail_desk, running_total but got 'chess'"),
        (["--tasks", "retail_desk", "retail_desk"], "to name every task once"),
        (["--seeds", "0"], "Expected --seeds to be at least 1 but got 0"),
        (["--workers", "-1"], "Expected --workers to be at least 1 but got -1"),
        (["--first-seed", "-3"], "Expected --first-seed to be at least 0 but got -3"),
        (["--seeds", "two"], "invalid int value"),
        (["--colour"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_stop_at_once(arguments, message, tmp_path, capsys):
    directories = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stopped:
        demo.parse_arguments([*arguments, *directories])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--out", str(tmp_path / "file"), "--cache", str(tmp_path)])
    assert "Expected --out to be a directory that can be made" in capsys.readouterr().err


def test_out_that_is_not_writable(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.os, "access", lambda path, mode: path.name != "out")  # root may write anywhere
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert "Expected --out to be writable but got" in capsys.readouterr().err


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short, full = demo.parse_arguments([]), demo.parse_arguments(["--full"])
    assert (short.tasks, short.seeds) == (["retail_desk"], 2)
    assert (full.tasks, full.seeds) == (["retail_desk", "running_total"], 5)
    assert demo.parse_arguments(["--full", "--seeds", "3"]).seeds == 3
    assert set(demo.TASK_NAMES) < set(training_tasks())


def training_tasks():
    from examples.sft_to_rl.tasks import TASKS

    return TASKS


def test_main_process_stays_light():
    """The parent only starts workers: it must not spend seconds on imports that they do anyway."""
    heavy = "{'torch', 'lightning', 'transformers', 'numpy'}"
    code = f"import sys, examples.sft_to_rl.demo; print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


@pytest.mark.slow
def test_failure_in_a_worker_fails_the_demo_with_its_traceback(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    code = f"""
from pathlib import Path
from examples.sft_to_rl import demo
if __name__ == "__main__":
    out = Path({str(tmp_path)!r})
    jobs = [demo.Job("retail_desk", seed, out, out / "cache", True, False) for seed in (901, 902)]
    demo.run_jobs(jobs, workers=2)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    finished = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ".", "PATH": ""},
        timeout=300,
    )
    assert finished.returncode != 0
    assert "pretrained_base" in finished.stderr  # where in the worker
    assert "FileExistsError" in finished.stderr


@pytest.mark.slow
def test_workers_give_what_one_process_gives(tmp_path):
    """Two spawned workers against one process: the same curves, seed by seed."""
    results = []
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "examples.sft_to_rl.demo", "--miniature", "--first-seed", "901"]
        directories = ["--out", str(tmp_path / workers), "--cache", str(tmp_path / f"cache{workers}")]
        subprocess.run([*command, "--workers", workers, *directories], check=True, capture_output=True)
        results.append(json.loads((tmp_path / workers / "summary.json").read_text()))
    one, two = ([seed["curves"] for seed in r["arms"]["rejuvenated"]["per_seed"]] for r in results)
    assert one == two
