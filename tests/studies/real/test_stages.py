"""A job that was cut off and is done again."""

from __future__ import annotations

import pytest
import torch

from studies.real.jobs import Job
from studies.real.knowledge import Knowledge
from studies.real.model import load_model, save_model
from studies.real.record import Record
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


def test_a_start_that_is_made_again_takes_the_alpha_that_its_search_found(stages):
    """The search takes longer than everything else that makes the start."""
    fusion, recipe = Job("start", "T", 7, "fusion"), made_up.recipe()
    Record(stages.out, recipe, 7).add(fusion, {"edit": {"alpha": 0.37}})
    made = stages.perform(fusion)["edit"]
    assert (made["alpha"], made["search"]) == (0.37, None)
    expected = torch.lerp(*(load_model(path).lm_head.weight for path in ends(stages.workspace, recipe)), 0.37)
    found = load_model(stages.workspace.start(recipe, 7, "fusion")).lm_head.weight
    torch.testing.assert_close(found, expected)


def ends(workspace, recipe):
    return workspace.base(recipe), workspace.start(recipe, 7, "excessive")
