"""Writes what the demo found: the printed table, ``summary.json`` and ``report.png``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.sft_to_rl.picture import draw
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.summary import findings, summarise, table


def write_report(
    results: Sequence[dict[str, Any]], out: Path, miniature: bool, seconds: float
) -> dict[str, Any]:
    """Print tables and findings, write the files under `out`, and return the summary."""
    settings = Settings.miniature() if miniature else Settings()
    summary = summarise(results, settings, seconds, miniature)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(summary, out / "report.png")
    for name, of_task in summary["tasks"].items():
        print(f"\n{table(name, of_task)}\n")
        if not miniature:
            print("\n".join(textwrap.fill(sentence, 110) for sentence in findings(of_task)))
    if miniature:
        print("Miniature: the stages ran; nothing was learned and the numbers mean nothing.")
    print(f"\n{seconds:.0f} s in all. Written: {out / 'summary.json'}, {out / 'report.png'}")
    print(f"Curves: tensorboard --logdir {out / 'tensorboard'}")
    return summary
