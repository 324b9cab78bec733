"""What is run in which order, after what, and what a failure stops."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from studies.real import run
from studies.real.arms import ARMS, CORE, LAST, LINE, REST, STARTS
from studies.real.jobs import Job, arm_jobs, with_needs
from studies.real.recipes import RECIPES
from studies.real.schedule import Here, run_jobs
from studies.real.seeds import RL_SEEDS, SFT_SEEDS
from studies.real.workspace import Workspace


@pytest.fixture
def arms():
    return arm_jobs(["V", "X"], SFT_SEEDS, RL_SEEDS)


def test_every_arm_is_planned_and_starts_somewhere():
    assert {*CORE, *REST, *LAST, *LINE} == set(ARMS)
    assert {arm.start for arm in ARMS.values()} == set(STARTS)


def test_the_plan_names_what_the_code_runs():
    text = (Path(run.__file__).parent / "plan.md").read_text()
    assert set(re.findall(r"`(\w+)`", text)) >= set(ARMS)
    assert f"SFT {', '.join(map(str, SFT_SEEDS))}; for each, RL {', '.join(map(str, RL_SEEDS))}" in text
    for recipe in (RECIPES["V"], RECIPES["X"]):
        rungs = "; ".join([f"{recipe.moderate}", "6 and 10", f"{recipe.excessive} epochs"])
        assert rungs in text
        responses = recipe.rl.steps * recipe.rl.prompts * recipe.rl.group
        assert f"{recipe.rl.steps} steps, {responses:,} responses" in text
    order = [text[text.index("## Order") :].index(f"`{arm}`") for arm in (*CORE, *REST)]
    assert order == sorted(order)


def test_blocks_of_the_core_come_first(arms):
    blocks = [arms[first : first + 5] for first in range(0, 60, 5)]
    assert all(tuple(job.name for job in block) == CORE for block in blocks)
    keys = [{(job.recipe, job.sft_seed, job.rl_seed) for job in block} for block in blocks]
    assert all(len(key) == 1 for key in keys)
    assert [next(iter(key)) for key in keys[:3]] == [("V", 101, 201), ("X", 101, 201), ("V", 102, 201)]
    assert {key for of in keys[:6] for key in of} == {(r, s, 201) for r in "VX" for s in SFT_SEEDS}
    assert len(arms) == len(set(arms)) == 12 * (len(CORE) + len(REST)) + len(LAST)
    rest = arms[60:]
    assert {job.rl_seed for job in rest[: 6 * len(REST) + 1]} == {201}
    assert rest[6 * len(REST)] == Job("arm", "V", 101, "trl", 201)
    assert {job.rl_seed for job in rest[6 * len(REST) + 1 :]} == {202}


def test_named_arms_alone():
    jobs = arm_jobs(["X"], [5], [6, 7], ["hot", "base"])
    assert [(job.name, job.rl_seed) for job in jobs] == [("hot", 6), ("base", 6), ("hot", 7), ("base", 7)]


def test_what_is_needed_comes_before_and_once(arms):
    jobs = with_needs(arms)
    assert len(jobs) == len(set(jobs))
    for at, job in enumerate(jobs):
        assert set(job.needs()) <= set(jobs[:at])
    assert sum(job.kind == "base" for job in jobs) == 2
    assert sum(job.kind == "ladder" for job in jobs) == 6
    reset = Job("start", "V", 101, "fusion_reset")
    assert Job("start", "V", 101, "fusion") in reset.needs()  # its alpha is the one found there
    assert [job for job in jobs if job.kind == "arm"] == arms


def test_what_is_done_is_left_out_with_all_that_it_needed(arms):
    jobs = with_needs(arms[:1], lambda job: job.kind == "start")
    assert jobs == arms[:1]
    assert with_needs(arms, lambda job: True) == []


def test_a_start_has_a_directory_of_its_own(tmp_path):
    workspace = Workspace(tmp_path / "pretrained", tmp_path)
    places = [
        workspace.start(RECIPES[recipe], seed, name)
        for recipe in "VX"
        for seed in SFT_SEEDS
        for name in STARTS
    ]
    assert len(set(places)) == len(places) - 2 * (len(SFT_SEEDS) - 1)  # the base is one for all seeds
    with pytest.raises(ValueError, match="Expected recipe A to write a checkpoint after 7 epochs"):
        STARTS["sft_7"] = type(STARTS["sft_6"])(7)
        try:
            workspace.start(RECIPES["A"], 101, "sft_7")
        finally:
            del STARTS["sft_7"]


def test_jobs_run_after_what_they_need_and_no_more_than_there_are_workers(arms):
    jobs = with_needs(arms)
    lock, ended, running, most = Lock(), set(), set(), []

    def perform(job):
        with lock:
            assert set(job.needs()) <= ended
            running.add(job)
            most.append(len(running))
        with lock:
            running.remove(job)
        return job.label

    def finished(job, label):
        assert label == job.label
        with lock:
            ended.add(job)

    with ThreadPoolExecutor(8) as pool:
        assert run_jobs(jobs, perform, pool, 3, finished) == {}
    assert ended == set(jobs)
    assert max(most) <= 3


def test_in_one_process_the_order_is_that_of_the_list(arms):
    done = []
    jobs = with_needs(arms)
    assert run_jobs(jobs, done.append, Here(), 1, lambda job, result: None) == {}
    assert done == jobs


def test_a_failure_stops_what_needs_it_and_nothing_else(arms, capsys):
    jobs = with_needs(arms)
    broken = Job("start", "V", 101, "fusion")
    done = []

    def perform(job):
        if job == broken:
            raise ValueError("no alpha")
        done.append(job)

    failures = run_jobs(jobs, perform, Here(), 1, lambda job, result: None)
    stopped = {
        job for job in jobs if job.recipe == "V" and job.sft_seed == 101 and job.name.startswith("fusion")
    }
    stopped |= {Job("arm", "V", 101, "trl", 201)}
    assert set(failures) == stopped
    assert set(done) == set(jobs) - stopped
    assert "ValueError: no alpha" in failures[broken]
    assert failures[Job("start", "V", 101, "fusion_reset")] == "V start fusion SFT seed 101 failed"
    assert capsys.readouterr().err.count("no alpha") == 2  # its message, and the line that raises it
