"""The page on the structure is the structure: every room has a floor, and uses rooms of lower floors alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_rejuv

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_rejuv"
# `_compat` stands beside the floors; the other two are the package's own front.
BESIDE = {"_compat", "__init__", "__main__"}
# `Anchor.open` is the one door for users, and what it opens are anchors themselves.
FACTORIES = {("lightning_rejuv.anchor.anchor", "lightning_rejuv.anchor.sources")}
# Only these may import what training needs, and only they and nothing else is loaded with it.
OF_LIGHTNING = {"callbacks", "loggers", "metrics", "plasticity_probe"}


def _floors() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs" / "structure.md").read_text(), flags=re.M)
    return {room.strip("/"): int(floor) for floor, rooms in rows for room in re.findall(r"`(.*?)`", rooms)}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _imported(path: Path) -> Iterator[tuple[str, int]]:
    """The full names of all modules that a file imports, wherever it does, and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lightning_rejuv":
            for name in node.names:  # a name of the front page stands for the module that defines it
                yield lightning_rejuv._LATER.get(name.name, f"lightning_rejuv.{name.name}"), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inside = f"{node.module}.{name.name}"
                yield (inside if _is_module(inside) else node.module), node.lineno
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno


def test_every_room_has_a_floor():
    assert {_room(path) for path in _modules()} - BESIDE == set(_floors())


@pytest.mark.parametrize("room", sorted(_floors()))
def test_a_room_uses_rooms_of_lower_floors_alone(room):
    floors = _floors()
    wrong = []
    for path in _modules():
        if _room(path) != room:
            continue
        for module, line in _imported(path):
            used = module.split(".")[1] if module.startswith("lightning_rejuv.") else ""
            if used in floors and used != room and floors[used] >= floors[room]:
                where = f"{path.relative_to(ROOT)}:{line}"
                wrong.append(
                    f"{where} imports {module}, of floor {floors[used]}; {room} is on {floors[room]}"
                )
    assert not wrong, "\n".join(wrong)


def test_files_of_a_room_use_each_other_in_one_direction():
    """No file imports, through whichever others, itself; what is imported for type checkers alone counts."""
    uses = {}
    for path in _modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        uses[name] = {module for module, _ in _imported(path)}
    known, done = set(uses), set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for used in sorted(used for used in uses[name] & known if (name, used) not in FACTORIES):
                visit(used, (*above, name))
            done.add(name)

    for name in sorted(known):
        visit(name, ())


def test_what_training_needs_is_imported_where_it_is_needed():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in _modules()
        if _room(path) not in {*OF_LIGHTNING, "_compat"}
        for module, line in _imported(path)
        if module.split(".")[0] in ("lightning", "torchmetrics", "pytorch_lightning")
    ]
    assert not wrong, "\n".join(wrong)


def test_files_named_in_the_structure_page_exist():
    text = (ROOT / "docs" / "structure.md").read_text()
    for name in re.findall(r"`([a-z_0-9/]+\.py)`", text):
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name


def test_tests_named_in_the_page_of_inputs_exist():
    found = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "inputs.md").read_text())
    assert len(found) > 40
    for file, test in found:
        source = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in source, f"{file}::{test}"
