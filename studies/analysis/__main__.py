"""From raw results to tables, figures and the page.

    .venv/bin/python -m studies.analysis

It reads ``docs/results/study/<task>.jsonl`` and ``docs/results/second/<task>.jsonl``, finished or not, and writes
``docs/images/study-*.png`` and the tables between the marks of ``README.md`` and of the pages in ``docs/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.analysis.figures import draw
from studies.analysis.page import filled, pages
from studies.analysis.results import FIRST, SECOND_EDITION, load
from studies.analysis.second_figure import draw_second
from studies.analysis.summary import summarise

ROOT = Path(__file__).resolve().parents[2]


def main(root: Path) -> None:
    """Update the pages and their figures below `root`, the repository.

    Raises:
        SystemExit: There are no results of the first edition yet.
    """
    results, images = root / "docs" / "results", root / "docs" / "images"
    tasks = load(results / FIRST.directory)
    if not tasks:
        raise SystemExit(
            f"Expected results of at least one reported seed in {results / FIRST.directory} but found none."
        )
    second = load(results / SECOND_EDITION.directory, SECOND_EDITION)
    summary = summarise(tasks, results)
    draw(tasks, summary, images)
    if second:
        draw_second(second).savefig(images / "study-second.png", metadata={"Software": None})
    for page in pages(root):
        page.write_text(filled(page.read_text(), summary, second))
    for edition, of_edition in ((FIRST, tasks), (SECOND_EDITION, second)):
        for task in of_edition.values():
            runs = sum(len(task.records(arm)) for arm in task.arms)
            print(
                f"{edition.directory}: {task.title}: {len(task.seeds)} seeds, {len(task.arms)} arms, {runs} runs of RL"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m studies.analysis", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    main(parser.parse_args().root)
