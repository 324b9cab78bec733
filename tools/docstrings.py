"""Docstrings as mkdocstrings takes them: our few reStructuredText constructs become Markdown.

The source keeps the roles, tables and doctests that read well in an editor and in ``help()``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import griffe

_ROLE = re.compile(r":(class|meth|func|data|mod|attr|exc|math):`~?([^`]+)`")
_RULE = re.compile(r"\s*=+( +=+)+\s*$")
_PACKAGE = "lightning_rejuv"


def markdown(docstring: str) -> str:
    """Convert one docstring."""
    titled = re.sub(r"(?m)^( *)Example: (.+)$", r"\1Examples:\n\1    \2", docstring)
    lines = re.sub(r"(?m)^( *)Example::$", r"\1Examples:", titled).splitlines()
    lines = list(_fenced_doctests(_formulas(_tables(lines))))
    return _ROLE.sub(_reference, "\n".join(lines))


class Markdown(griffe.Extension):
    """Converts every docstring when its object is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def _reference(role: re.Match[str]) -> str:
    """A link if the target is written in full and documented, code otherwise."""
    kind, target = role.groups()
    if kind == "math" or not target.startswith(_PACKAGE):
        return f"`{target}`"
    name = target.rpartition(".")[2]
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'


def _tables(lines: list[str]) -> Iterator[str]:
    """Simple tables: between three rules of ``=``; columns start where the rule's do."""
    columns: list[slice] = []
    rules = 0
    row: list[str] = []

    def finished() -> Iterator[str]:
        if row:
            yield "| " + " | ".join(row) + " |"
            row.clear()

    for line in lines:
        if _RULE.match(line):
            yield from finished()
            starts = [match.start() for match in re.finditer("=+", line)]
            columns = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
            rules = (rules + 1) % 3
            if rules == 2:
                yield "|" + " --- |" * len(columns)
        elif rules:
            cells = [line[column].strip() for column in columns]
            if row and not cells[0]:  # the row goes on
                row[:] = [f"{old} {new}".strip() for old, new in zip(row, cells, strict=True)]
            else:
                yield from finished()
                row[:] = cells
        else:
            yield line


def _formulas(lines: Iterator[str]) -> Iterator[str]:
    """Formulas as they are written: nothing on the page draws LaTeX."""
    for line in lines:
        before, found, formula = line.partition(".. math::")
        yield f"{before}`{formula.strip()}`" if found and formula.strip() else line.replace(".. math::", "")


def _fenced_doctests(lines: Iterator[str]) -> Iterator[str]:
    """Doctests as code blocks, also if no section announces them."""
    doctest = False

    def part_of_doctest(line: str) -> bool:
        nonlocal doctest
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        return doctest

    for is_doctest, block in groupby(lines, part_of_doctest):
        rows = list(block)
        indent = rows[0][: len(rows[0]) - len(rows[0].lstrip())]
        yield from ([f"{indent}```pycon", *rows, f"{indent}```"] if is_doctest else rows)
