"""Results of all seeds of a task lie in one file: whoever adds to it loses nothing of the others."""

from __future__ import annotations

import json
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

from studies.arms import EDITION_2_SEEDS, LENGTH_SEEDS, REPORTED_SEEDS, RULE_SEEDS
from studies.files import read_seeds
from studies.record import Record
from studies.sizes import sizes

TASK, SETTINGS = sizes("retail_desk", miniature=True)


def _record(root, seed=901, base="1f"):
    record = Record(root, TASK, seed, SETTINGS)
    record.of_base(base, {"responses": 96})
    return record


def test_workers_of_several_seeds_write_one_file(tmp_path):
    records = {seed: _record(tmp_path, seed) for seed in range(901, 909)}
    arms = [f"arm {number}" for number in range(10)]

    def run(seed):
        for arm in arms:
            records[seed].add(arm, {"of": [seed, arm]})

    with ThreadPoolExecutor(len(records)) as pool:
        list(pool.map(run, records))
    found = read_seeds(tmp_path / "retail_desk.jsonl")
    assert {seed: content["arms"] for seed, content in found.items()} == {
        seed: {arm: {"of": [seed, arm]} for arm in arms} for seed in records
    }
    assert found[905]["base"] == "1f"
    assert [path.name for path in tmp_path.iterdir()] == ["retail_desk.jsonl"]


def test_what_another_process_added_to_the_same_seed_is_kept(tmp_path):
    ours, theirs = _record(tmp_path), _record(tmp_path)
    theirs.add("base", {"alpha": None})
    ours.add("rigid", {"alpha": 0.8})
    assert ours.arms == {"base": {"alpha": None}, "rigid": {"alpha": 0.8}}
    assert read_seeds(ours.path)[901]["arms"] == ours.arms
    assert Record(tmp_path, TASK, 901, SETTINGS).content == ours.content


def test_arms_from_two_bases_are_never_in_one_seed(tmp_path):
    ours, theirs = _record(tmp_path), _record(tmp_path, base="2e")
    theirs.add("base", {})
    with pytest.raises(
        ValueError, match=r"Expected the base of seed 901 in .* to have the digest 2e but .* to 1f now"
    ):
        ours.add("rigid", {})
    assert list(read_seeds(ours.path)[901]["arms"]) == ["base"]


def test_new_seeds_say_with_what_they_were_made(tmp_path):
    found = Record(tmp_path, TASK, 901, SETTINGS).content["version"]
    assert list(found) == ["lightning_rejuv", "torch", "transformers", "cpu"]
    assert (found["torch"], found["transformers"]) == (torch.__version__, transformers.__version__)
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert f"model name\t: {found['cpu']}\n" in Path("/proc/cpuinfo").read_text()


def test_seeds_that_were_recorded_before_processors_were_are_continued(tmp_path):
    recorded = Path(__file__).parents[2] / "docs/results/study/retail_desk.jsonl"
    shutil.copy(recorded, tmp_path)
    task, settings = sizes("retail_desk")
    record = Record(tmp_path, task, 1001, settings)
    version = json.loads(recorded.read_text().splitlines()[0])["version"]
    assert "cpu" not in version
    record.add("refit_40", {})
    assert read_seeds(record.path)[1001]["version"] == version
    assert "base" in read_seeds(record.path)[1001]["arms"]


def test_tuning_seeds_are_not_reported(tmp_path):
    kinds = {
        seed: Record(tmp_path, TASK, seed, SETTINGS).content["kind"]
        for seed in (*REPORTED_SEEDS, *EDITION_2_SEEDS, *LENGTH_SEEDS, *RULE_SEEDS, 905)
    }
    reported = {seed for seed, kind in kinds.items() if kind == "reported"}
    assert reported == {*REPORTED_SEEDS, *EDITION_2_SEEDS, *LENGTH_SEEDS}
