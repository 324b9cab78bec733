"""From raw results to tables, figures and the page.

    .venv/bin/python -m studies.analysis

It reads ``docs/results/study/<task>.jsonl``, finished or not, and writes ``docs/images/study-*.png`` and the tables
between the marks of ``docs/evidence.md``, its appendix and ``README.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.analysis.figures import draw
from studies.analysis.page import PAGES, filled
from studies.analysis.results import load
from studies.analysis.summary import summarise

ROOT = Path(__file__).resolve().parents[2]


def main(root: Path) -> None:
    """Update the pages and their figures below `root`, the repository.

    Raises:
        SystemExit: There are no results yet.
    """
    results = root / "docs" / "results" / "study"
    tasks = load(results)
    if not tasks:
        raise SystemExit(f"Expected results of at least one reported seed in {results} but found none.")
    summary = summarise(tasks, results.parent)
    draw(tasks, summary, root / "docs" / "images")
    for page in (root / name for name in PAGES):
        page.write_text(filled(page.read_text(), summary))
    for task in summary["tasks"].values():
        runs = sum(row["n"] for row in task["arms"].values())
        print(f"{task['title']}: {len(task['seeds'])} seeds, {len(task['arms'])} arms, {runs} runs of RL")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m studies.analysis", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    main(parser.parse_args().root)
