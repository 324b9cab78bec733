"""Bring the results of a finished demo into the documentation, so that no figure is typed by hand.

    make demo
    .venv/bin/python -m tools.demo_figures runs/demo
    make demo-full ARGS="--out runs/demo-full"
    .venv/bin/python -m tools.demo_figures runs/demo-full

It keeps the summary without curves as ``docs/results/demo.json`` or ``demo-full.json``, and the picture, and writes
tables and findings between the marks (``<!-- demo: … -->``) of README.md and docs/demo.md; ``tests/test_readme.py``
checks that they agree.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from examples.sft_to_rl.arms import ARMS
from examples.sft_to_rl.summary import findings, headline, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "demo.json"
FULL_RESULTS = RESULTS.with_name("demo-full.json")
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
    versions = summary["versions"]
    return {
        "headline": headline(summary),
        "table": "\n".join(rows),
        "budget": (
            f"Pass@1 before → after the same GRPO: {summary['rl_budget']:,} sampled responses per arm, seeds "
            f"{', '.join(map(str, summary['seed_numbers']))}, means."
        ),
        "versions": (
            f"Python {versions['python']}, torch {versions['torch']}, lightning {versions['lightning']}, "
            f"torchmetrics {versions['torchmetrics']}, transformers {versions['transformers']}"
        ),
        "printed": f"```text\n{_without_seconds(table(summary['task'], summary))}\n```",
        "findings": "\n".join(f"- {sentence.replace('->', '→')}" for sentence in findings(summary)),
    }


def full_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the demo of both tasks: every seed of each, without curves."""
    kept = {key: summary[key] for key in ("seeds", "seed_numbers", "rl_budget", "versions", "seconds")}
    return {**kept, "tasks": {name: without_curves(task) for name, task in summary["tasks"].items()}}


def full_blocks(full: dict[str, Any]) -> dict[str, str]:
    """The same for the demo of both tasks."""
    tables = [_without_seconds(table(name, task)) for name, task in full["tasks"].items()]
    runs = full["seeds"] * len(full["tasks"])
    won = {arm: sum(task["arms"][arm]["successes"] for task in full["tasks"].values()) for arm in ARMS}
    return {
        "full printed": "```text\n" + "\n\n".join(tables) + "\n```",
        "full successes": (
            f"rejuvenated reaches 0.5 in {won['rejuvenated']} of {runs} runs, excessive SFT in {won['oversft']}, "
            f"the base in {won['base']} and moderate SFT in {won['modsft']}"
        ),
    }


def filled(text: str, made: dict[str, str]) -> str:
    """A page with its blocks replaced."""
    for name, block in made.items():
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
    summary = json.loads((run / "summary.json").read_text())
    if summary["miniature"]:
        raise SystemExit(
            "Expected the results of a whole demo but got those of a miniature: they mean nothing."
        )
    if len(summary["tasks"]) > 1:
        kept, path, picture = full_summary(summary), FULL_RESULTS, "report-full.png"
        made = full_blocks(kept)
    else:
        kept, path, picture = without_curves(summary), RESULTS, "report.png"
        made = blocks(kept)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    # 256 colours: a third of the size, and looks the same.
    shown = Image.open(run / "report.png").convert("RGB").quantize(256)
    shown.save(ROOT / "docs" / "images" / picture, optimize=True)
    for page in (ROOT / "README.md", ROOT / "docs" / "demo.md"):
        page.write_text(filled(page.read_text(), made))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
