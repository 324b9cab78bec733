from __future__ import annotations

import pytest

from tests.studies.real import made_up


@pytest.fixture
def miniature(monkeypatch, tmp_path):
    """The study with recipe T alone, made-up sums and a tiny pretrained model; returns where things lie."""
    from studies.real import evaluate, jobs, recipes, resets, run, stages, texts, workspace
    from studies.real.model import save_model

    for module in (recipes, resets, run, stages, workspace):
        monkeypatch.setattr(module, "RECIPES", {"T": made_up.recipe()})
    for module in (evaluate, stages, texts):
        monkeypatch.setattr(module, "SPLITS", made_up.SPLITS)
    monkeypatch.setattr(jobs, "REST", ("base", "longer", "entropy_bonus", "hot"))
    monkeypatch.setattr(jobs, "LAST", ())
    save_model(made_up.llama(), made_up.tokenizer(), tmp_path / "pretrained")
    return tmp_path
