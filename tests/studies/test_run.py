from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from studies import run as run_module
from studies.arms import SECOND_SEEDS
from studies.files import seeds_as_lines
from studies.passes import FIRST_TASKS, passes
from studies.run import main, parse_arguments


@pytest.fixture
def jobs(monkeypatch):
    """Every job that would be run, in order; those of seed 903 fail."""
    done = []

    def run_job(job):
        done.append(job)
        if job.seed == 903:
            raise ValueError("a bad seed")
        for _ in job.arms:
            run_module._progress.finished(f"{job.label} an arm")

    monkeypatch.setattr(run_module, "run_job", run_job)
    return done


def test_tasks_alternate_seed_after_seed_and_pass_after_pass(jobs, tmp_path, capsys):
    assert main(["--workers", "1", "--out", str(tmp_path)]) == 0
    tasks = ("retail_desk", "running_total")
    planned = [p for p in passes("retail_desk") if p.arms]
    assert [(job.task, job.seed) for job in jobs] == [(t, s) for p in planned for s in p.seeds for t in tasks]
    assert [job.arms for job in jobs[:2]] == [passes(task)[0].arms for task in tasks]
    assert jobs[40] == replace(jobs[0], seed=SECOND_SEEDS[0], arms=planned[1].arms)
    lines = capsys.readouterr().out.splitlines()
    total = sum(len(p.seeds) * len(p.arms) for task in tasks for p in passes(task))
    assert len(lines) == total + 1
    assert lines[0].startswith(f"[1/{total}, ")
    assert lines[-2].startswith(f"[{total}/{total}, 0 min left]")
    assert lines[-1] == "Done; failed: none."


def test_named_seeds_run_whatever_is_asked_for(jobs, tmp_path):
    arguments = ["--workers", "1", "--seeds", "901", "902", "--tasks", "retail_desk", "--out", str(tmp_path)]
    assert main([*arguments, "--groups", "tuning", "--arms", "rigid"]) == 0
    of_first = [job.arms for job in jobs if job.seed == 901]
    assert of_first == [job.arms for job in jobs if job.seed == 902]
    assert of_first[0] == ("rigid",)  # once, though both sets of seeds have it
    assert of_first[1:] == [p.arms for p in passes("retail_desk", ["tuning"]) if p.arms]


def test_a_seed_that_fails_is_reported_and_does_not_stop_the_others(jobs, tmp_path, capsys):
    arguments = ["--workers", "1", "--seeds", "902", "903", "904", "--arms", "base", "--out", str(tmp_path)]
    assert main([*arguments, "--tasks", *FIRST_TASKS]) == 2
    assert [job.seed for job in jobs] == [902, 902, 903, 903, 904, 904]
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "Done; failed: retail_desk seed 903, running_total seed 903."
    assert err.count("ValueError: a bad seed") == 2


def test_only_what_is_missing_is_run(jobs, tmp_path):
    done = {901: {"seed": 901, "arms": {"base": {}, "rigid": {}}}, 902: {"seed": 902, "arms": {"hot": {}}}}
    (tmp_path / "retail_desk.jsonl").write_text(seeds_as_lines(done))
    arguments = ["--workers", "1", "--seeds", "901", "--arms", "base", "rigid", "hot", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert [(job.task, job.arms) for job in jobs] == [
        ("retail_desk", ("hot",)),
        ("running_total", ("base", "rigid", "hot")),
        ("price_desk", ("base",)),
        ("price_desk", ("hot",)),
    ]
    jobs.clear()
    assert main([*arguments, "--tasks", "retail_desk", "--arms", "base"]) == 0
    assert jobs == []


def test_sizes_are_kept_apart():
    assert parse_arguments([]).out == Path("docs/results/study")
    assert parse_arguments(["--model", "large"]).out == Path("docs/results/study-large")
    assert parse_arguments(["--miniature"]).out == Path("runs/miniature/study")
    assert parse_arguments([]).seeds == []  # those of each pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "Expected --workers to be at least 1 but got 0"),
        (["--arms", "rigd"], "Expected an arm of studies/arms.py but got 'rigd'"),
        (["--arms", "fusion of equal support"], "fusion_50_equal_support, rigid_equal_support"),
        (["--groups", "everything"], "invalid choice: 'everything'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_arms_are_called_as_the_pages_call_them():
    names = [
        "sft_64",
        "SFT, 64 epochs",
        "moderate SFT (`sft_8`)",
        "fusion of equal support (`rigid_equal_support`)",
    ]
    found = parse_arguments(["--arms", *names]).arms
    assert found == ["sft_64", "sft_64", "sft_8", "rigid_equal_support"]
