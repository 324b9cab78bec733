"""Which verifier a name stands for, and what is said of a name that stands for none."""

from __future__ import annotations

import sys

import pytest

from lightning_rejuv.verifier import import_verifier

RIGHT = """
def right(prompt, response):
    return True

class Check:
    class Inner:
        @staticmethod
        def right(prompt, response):
            return False
"""
MODULES = {
    "right_module": RIGHT,
    "bad_syntax": "def right(:\n",
    "bad_name": "raise NameError('API_KEY')\n",
    "bad_attribute": "import os\nos.no_such\n",
    "bad_import": "import nowhere_to_be_found\n",
    "bad_names_itself": "from bad_names_itself import right\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with modules, on no path: a console script's."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "in_package").mkdir()
    (tmp_path / "in_package" / "right.py").write_text(RIGHT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    yield tmp_path
    for name in (*MODULES, "in_package", "in_package.right"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("right_module:right", True),
        ("right_module:Check.Inner.right", False),
        ("in_package.right:right", True),
        ("operator:eq", False),
    ],
)
def test_modules_of_the_working_directory_and_installed_ones_are_found(name, answer, here):
    before = list(sys.path)
    assert import_verifier(name)("prompt", "response") is answer
    assert sys.path == before


@pytest.mark.parametrize("name", ["./right_module.py:right", "right_module.py:right", "/a/b:right"])
def test_a_path_is_told_to_be_one(name, here):
    with pytest.raises(ValueError, match="but got the path of a file, '.*': name the module, without '.py'"):
        import_verifier(name)


@pytest.mark.parametrize("name", ["", ":", "json", "json:", ":loads", "json:a..b", ".json:loads"])
def test_another_form_is_refused(name, here):
    with pytest.raises(ValueError, match="Expected `verifier` as MODULE:FUNCTION .* but got '"):
        import_verifier(name)


@pytest.mark.parametrize("name", ["no_such", "no_such.part", "json.no_such"])
def test_a_module_that_is_not_there(name, here):
    missing = name if name.startswith("json") else "no_such"
    with pytest.raises(
        ValueError, match=f"there is none of the name '{missing}', neither installed nor in .*'{here}'"
    ):
        import_verifier(f"{name}:right")


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("bad_syntax", "SyntaxError while it was imported: .*bad_syntax.py, line 1"),
        ("bad_name", "NameError while it was imported: API_KEY"),
        ("bad_attribute", "AttributeError while it was imported: .*no_such"),
        ("bad_import", "ModuleNotFoundError while it was imported: .*nowhere_to_be_found"),
        ("bad_names_itself", "ImportError while it was imported: "),
    ],
)
def test_a_module_that_raises_is_told_apart_and_its_error_is_the_cause(module, error, here):
    with pytest.raises(ValueError, match=f"The module '{module}' of `verifier` raised {error}") as raised:
        import_verifier(f"{module}:right")
    assert type(raised.value.__cause__).__name__ == error.partition(" ")[0]
    assert str(here) not in sys.path


@pytest.mark.parametrize("function", ["no_such", "Check.no_such", "right.no_such"])
def test_a_function_that_is_not_there(function, here):
    with pytest.raises(ValueError, match=f"holds no '{function}'; it holds \\['Check', 'right'\\]"):
        import_verifier(f"right_module:{function}")
