"""Raw results: continued, refused if something else made them, whole at every moment; and which jobs they spare."""

from __future__ import annotations

import dataclasses
import json

import pytest

from studies.real.arms import ARMS, STARTS
from studies.real.jobs import Job, arm_jobs
from studies.real.recipes import RECIPES, RL
from studies.real.record import Record, where
from studies.real.run import Book, parse_arguments
from studies.real.workspace import Workspace

START = Job("start", "V", 101, "moderate")
ARM = Job("arm", "V", 101, "moderate", 201)


def _scores(name: str = "moderate") -> dict:
    return {"made": ARMS[name].recipe(), "id": {"pass_at_1": 0.5}, "ood": {"pass_at_1": 0.25}, "seconds": 3.0}


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path, RECIPES["V"], 101)


def test_results_are_continued(record, tmp_path):
    assert not record.has(START)
    record.add(START, {"id": {"pass_at_1": 0.1}})
    record.add(ARM, _scores())
    again = Record(tmp_path, RECIPES["V"], 101)
    assert again.has(START)
    assert again.has(ARM)
    assert not again.has(dataclasses.replace(ARM, rl_seed=202))
    assert again.start("moderate") == {"id": {"pass_at_1": 0.1}}
    again.add(dataclasses.replace(ARM, rl_seed=202), _scores())
    content = json.loads((tmp_path / "V" / "seed_101.json").read_text())
    assert list(content["arms"]["moderate"]) == ["201", "202"]
    assert content == again.content
    assert list(tmp_path.joinpath("V").iterdir()) == [tmp_path / "V" / "seed_101.json"]


def test_what_another_process_added_meanwhile_is_kept(record, tmp_path):
    other = Record(tmp_path, RECIPES["V"], 101)
    record.add(START, {"id": {"pass_at_1": 0.1}})
    record.add(ARM, _scores())
    other.add(dataclasses.replace(ARM, rl_seed=202), _scores())
    content = json.loads((tmp_path / "V" / "seed_101.json").read_text())
    assert list(content["starts"]) == ["moderate"]
    assert list(content["arms"]["moderate"]) == ["201", "202"]


def test_another_recipe_is_refused(record, tmp_path):
    record.add(START, {})
    changed = dataclasses.replace(RECIPES["V"], rl=RL(steps=31))
    with pytest.raises(ValueError, match="to be made by recipe V as it is"):
        Record(tmp_path, changed, 101)


def test_another_arm_of_the_same_name_is_refused(record, tmp_path, monkeypatch):
    record.add(ARM, _scores())
    monkeypatch.setitem(ARMS, "moderate", dataclasses.replace(ARMS["moderate"], longer=2))
    with pytest.raises(ValueError, match="Expected arm 'moderate' .* to be made as today"):
        Record(tmp_path, RECIPES["V"], 101)


def test_where_names_machine_versions_and_day():
    found = where("cpu", "float32")
    assert {"device", "dtype", "torch", "transformers", "lightning_rejuv", "date"} <= set(found)
    assert all(found.values())


class TestBook:
    @pytest.fixture
    def workspace(self, tmp_path):
        made = Workspace(tmp_path / "pretrained", tmp_path / "cache")
        made.pretrained.mkdir()
        made.cache.mkdir()
        return made

    def _make(self, workspace, name: str):
        workspace.start(RECIPES["V"], 101, name).mkdir(parents=True)

    def test_a_start_whose_model_was_deleted_is_made_again_if_an_arm_needs_it(
        self, record, workspace, tmp_path
    ):
        record.add(Job("start", "V", 101, "fusion"), {"edit": {"alpha": 0.4}})
        arms = arm_jobs(["V"], [101], [201], ["fusion"])
        assert Job("start", "V", 101, "fusion") in Book(arms, workspace, tmp_path).jobs
        self._make(workspace, "fusion")
        assert Book(arms, workspace, tmp_path).jobs == arms

    def test_an_alpha_that_is_written_down_is_not_searched_for_again(self, record, workspace, tmp_path):
        record.add(Job("start", "V", 101, "fusion"), {"edit": {"alpha": 0.4}})
        arms = arm_jobs(["V"], [101], [201], ["fusion_reset"])
        jobs = Book(arms, workspace, tmp_path).jobs
        assert Job("start", "V", 101, "fusion") not in jobs
        assert Job("start", "V", 101, "fusion_reset") in jobs

    @pytest.mark.parametrize("same", [True, False])
    def test_a_start_that_is_made_again_and_became_another_is_said(
        self, same, record, workspace, tmp_path, capsys
    ):
        start = Job("start", "V", 101, "fusion")
        record.add(start, {**_scores("fusion"), "edit": {"alpha": 0.4}})
        book = Book(arm_jobs(["V"], [101], [202], ["fusion"]), workspace, tmp_path)
        book.finished(start, {**_scores("fusion"), "id": {"pass_at_1": 0.5 if same else 0.75}})
        said = capsys.readouterr().err
        if same:
            assert said == ""
        else:
            assert "V start fusion SFT seed 101 is not what was measured when it was made first" in said
            assert "0.5" in said
            assert "0.75" in said
        assert record.start("fusion")["id"] == {"pass_at_1": 0.5}  # the first one stands

    def test_an_edited_model_is_deleted_after_its_last_arm_and_a_rung_never(
        self, workspace, tmp_path, capsys
    ):
        names = ["fusion", "moderate"]
        arms = arm_jobs(["V"], [101], [201, 202], names)
        book = Book(arms, workspace, tmp_path)
        for name in names:
            self._make(workspace, name)
            book.finished(Job("start", "V", 101, name), _scores(name))
        edited, rung = (workspace.start(RECIPES["V"], 101, name) for name in names)
        for arm in arms[:2]:
            book.finished(arm, _scores(arm.name))
        assert edited.is_dir()
        for arm in arms[2:]:
            book.finished(arm, _scores(arm.name))
        assert not edited.is_dir()
        assert rung.is_dir()
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith(f"[6/{book.total}, ")
        assert (
            "V arm moderate SFT seed 101 RL seed 202: pass@1 0.50, out of distribution 0.25; 3 s" in lines[-1]
        )
        assert Book(arms, workspace, tmp_path).jobs == []


def test_a_missing_model_is_said_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--base", str(tmp_path)])
    assert "make study-real-model" in capsys.readouterr().err


def test_starts_that_are_edited_start_from_the_excessive_checkpoint():
    assert {start.checkpoint for start in STARTS.values() if start.edit} == {"excessive"}
