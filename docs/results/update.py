"""Bring the results of a finished demo into the documentation, so that no figure is typed by hand.

    make demo
    .venv/bin/python -m docs.results.update runs/demo

It keeps the summary without curves as ``docs/results/demo.json``, copies the picture, and writes table and findings
between the marks (``<!-- demo: … -->``) of README.md and docs/demo.md; ``tests/test_readme.py`` checks that they agree.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from examples.sft_to_rl.arms import ARMS
from examples.sft_to_rl.summary import findings, headline, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "demo.json"
BEGIN, END = "<!-- demo: {name} -->", "<!-- end -->"


def without_curves(value: Any) -> Any:
    """The summary without what has one value per step or epoch."""
    if isinstance(value, dict):
        left_out = {"curves", "sft", "tasks", "stage_seconds"}
        return {key: without_curves(item) for key, item in value.items() if key not in left_out}
    return [without_curves(item) for item in value] if isinstance(value, list) else value


def blocks(summary: dict[str, Any]) -> dict[str, str]:
    """What stands between the markers, by name."""
    rows = [
        "| RL starts from | in distribution | out of distribution | seeds that reach 0.5 |",
        "|---|---|---|---|",
    ]
    for arm, about in ARMS.items():
        row = summary["arms"][arm]
        points = (f"{row[split]['start']:.2f} → **{row[split]['end']:.2f}**" for split in ("id", "ood"))
        rows.append(f"| {' | '.join([about.title, *points])} | {row['successes']} of {summary['seeds']} |")
    edits = [result["rejuvenation"] for result in summary["arms"]["rejuvenated"]["per_seed"]]
    versions = summary["versions"]
    return {
        "headline": headline(summary),
        "table": "\n".join(rows),
        "budget": (
            f"Pass@1 before → after the same GRPO: {summary['rl_budget']:,} sampled responses per arm, seeds "
            f"{', '.join(map(str, summary['seed_numbers']))}, means."
        ),
        "alphas": " and ".join(f"{edit['alpha']:.2f}" for edit in edits),
        "versions": (
            f"Python {versions['python']}, torch {versions['torch']}, lightning {versions['lightning']}, "
            f"torchmetrics {versions['torchmetrics']}, transformers {versions['transformers']}"
        ),
        "printed": f"```text\n{_without_seconds(table(summary['task'], summary))}\n```",
        "findings": "\n".join(f"- {sentence.replace('->', '→')}" for sentence in findings(summary)),
    }


def filled(text: str, summary: dict[str, Any]) -> str:
    """A page with its blocks replaced."""
    for name, block in blocks(summary).items():
        begin, end = BEGIN.format(name=name), END
        around = "\n" if block.startswith(("|", "-", "`")) else ""
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(
            pattern, lambda _, b=begin, e=end, t=f"{around}{block}{around}": b + t + e, text, flags=re.S
        )
    return text


def _without_seconds(printed: str) -> str:
    """The table as `make demo` prints it, without the time that it took on some machine."""
    title, *lines, alphas = printed.splitlines()
    column = next(line.index("s per") for line in lines if "s per" in line) - 2
    kept = [(line[:column] + line[column + 7 :]).rstrip() for line in lines]
    return "\n".join([title, *kept, alphas])


def main(run: Path) -> None:
    """Update the documentation from the directory of a finished demo."""
    summary = without_curves(json.loads((run / "summary.json").read_text()))
    if summary["miniature"]:
        raise SystemExit(
            "Expected the results of a whole demo but got those of a miniature: they mean nothing."
        )
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    shutil.copyfile(run / "report.png", ROOT / "docs" / "images" / "report.png")
    for page in (ROOT / "README.md", ROOT / "docs" / "demo.md"):
        page.write_text(filled(page.read_text(), summary))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
