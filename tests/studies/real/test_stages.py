"""A job that was cut off and is done again."""

from __future__ import annotations

import pytest

from studies.real.jobs import Job
from studies.real.knowledge import Knowledge
from studies.real.model import load_model, save_model
from studies.real.stages import Stages
from studies.real.workspace import Workspace
from tests.studies.real import made_up

START = Job("start", "T", 7, "fused_40")


@pytest.fixture
def stages(miniature):
    """Stages with all that an edited start needs: a base, a ladder, the answers to ordinary questions."""
    workspace, recipe = Workspace(miniature / "pretrained", miniature), made_up.recipe()
    for seed, directory in enumerate(
        (workspace.base(recipe), workspace.ladder(recipe, 7) / f"epoch_{recipe.excessive}")
    ):
        save_model(made_up.llama(seed), made_up.tokenizer(), directory)
    Knowledge(workspace.knowledge, made_up.tokenizer()).ask(load_model(workspace.pretrained))
    return Stages(workspace, miniature / "results", "cpu")


def test_a_start_that_was_cut_off_while_it_was_measured_is_edited_again(stages, monkeypatch):
    """Its model is there and its report is lost, which holds the alpha that other starts take."""

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Stages, "_measure", cut_off)
        stages.perform(START)
    directory = stages.workspace.start(made_up.recipe(), 7, START.name)
    before = load_model(directory).state_dict()
    result = stages.perform(START)
    assert result["edit"] is not None
    assert result["edit"]["alpha"] == 0.4
    assert all(value.equal(before[name]) for name, value in load_model(directory).state_dict().items())
