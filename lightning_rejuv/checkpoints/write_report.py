"""What every output directory has: its report, its model card; and what every output has to keep clear of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from lightning_rejuv.anchor.links import lies_within
from lightning_rejuv.checkpoints.output import CARD, RECIPE, REPORT, write_file
from lightning_rejuv.checkpoints.report import CheckpointReport


def write_report(partial: Path, card_from: Path, report: CheckpointReport) -> None:
    """Write ``rejuvenation.json``, the recipe that does the same again, and the model card."""
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is no UTF-8 holds lone surrogates: as JSON's own escapes they come back as they were.
    write_file(partial / REPORT, text.encode(errors="backslashreplace"))
    recipe = yaml.safe_dump(report.recipe(), sort_keys=False)
    again = f"# lightning-rejuv rejuvenate --config {RECIPE} --out ANOTHER\n{recipe}"
    write_file(partial / RECIPE, again.encode())
    card = card_from / CARD
    theirs = lies_within(card_from, CARD) and card.is_file()
    existing = card.read_text(encoding="utf-8", errors="replace") if theirs else ""
    write_file(partial / CARD, report.card(existing).encode(errors="backslashreplace"))


def check_apart(out: Path, *inputs: Path) -> None:
    """Refuse an output inside of an input.

    Raises:
        ValueError: with both paths.
    """
    for path in inputs:
        real = Path(os.path.realpath(out))  # of links in a circle, too, which `mkdir` then names
        if Path(os.path.realpath(path)) in (real, *real.parents):
            raise ValueError(f"Expected the output {str(out)!r} to lie outside of the input {str(path)!r}.")


def check_room(out: Path, needed: int) -> None:
    """Refuse to begin where the disk cannot hold the output.

    Raises:
        OSError: with what is needed and what is free.
    """
    existing = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"Expected {needed / 2**30:.2f} GiB free at {str(existing)!r} for the output but there are "
            f"{free / 2**30:.2f} GiB."
        )
