"""Brings tables and sentences to their places in a page: ``<!-- study: name -->…<!-- end -->``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.analysis.findings import finding_blocks
from studies.analysis.forecast_tables import forecast_blocks
from studies.analysis.landscape_tables import landscape_blocks
from studies.analysis.markdown import fill_places, places
from studies.analysis.requirements import requirement_blocks
from studies.analysis.reset_tables import reset_blocks
from studies.analysis.results import TaskResults
from studies.analysis.second import second_blocks
from studies.analysis.tables import outcome_blocks
from studies.analysis.within_tables import within_blocks

PLACE = places("study")
#: How names begin of what is made from results of their own, which need not be there yet.
OF_OTHER_RESULTS = ("landscape ", "forecast real")
NOT_YET = "*No results yet.*"


def pages(root: Path) -> list[Path]:
    """README and the pages of docs/ that have places, below `root`, the repository."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [page for page in found if page.is_file() and PLACE.search(page.read_text())]


def blocks(summary: Mapping[str, Any], second: Mapping[str, TaskResults] | None = None) -> dict[str, str]:
    """Everything that a page may hold, by the name of its place.

    Args:
        summary: Of the first edition.
        second: Results of the second; without them its tables say that nothing has been run.
    """
    return {
        **outcome_blocks(summary),
        **requirement_blocks(summary),
        **reset_blocks(summary),
        **forecast_blocks(summary),
        **within_blocks(summary),
        **landscape_blocks(summary.get("landscape")),
        **finding_blocks(summary),
        **second_blocks(second or {}),
    }


def filled(text: str, summary: Mapping[str, Any], second: Mapping[str, TaskResults] | None = None) -> str:
    """A page with its places filled anew; where other results than the study's are missing it says so.

    Args:
        text: The page.
        summary: Of the first edition.
        second: Results of the second.

    Raises:
        ValueError: A place with a name that nothing is made for.
    """
    missing = {name: NOT_YET for name in PLACE.findall(text) if name.startswith(OF_OTHER_RESULTS)}
    return fill_places(text, "study", {**missing, **blocks(summary, second)})
