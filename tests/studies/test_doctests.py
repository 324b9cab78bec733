"""Doctests of the study's modules."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = [
    "files",
    "former_rules",
    *(f"real.{name}" for name in ("analysis", "jobs", "recipes", "sampling", "seeds", "tasks")),
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    found = doctest.testmod(import_module(f"studies.{name}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
