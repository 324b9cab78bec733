"""Demonstrations that SFT was trained on against others of their kind: what they cost, and what the model expects.

.venv/bin/python -m studies.real.seen --cache runs/real
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv.attribution import confidence, mean_entropy, mean_nll
from lightning_rejuv.calibration.checks import batches_for
from studies.real.model import end_of, load_model, load_tokenizer
from studies.real.recipes import RECIPES
from studies.real.texts import batches, demonstrations
from studies.real.workspace import Workspace

SEED = 101
PURPOSES = {"unseen": "calibration", "seen": "demonstrations"}


def rows(workspace: Workspace, recipes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield for each rung of a ladder nats a token, of both kinds of demonstrations: their cost, and the entropy."""
    for recipe in (RECIPES[name] for name in recipes):
        for epochs in recipe.sft.epochs:
            directory = workspace.ladder(recipe, SEED) / f"epoch_{epochs}"
            tokenizer, model = load_tokenizer(directory), load_model(directory).eval()
            row: dict[str, Any] = {"recipe": recipe.name, "epochs": epochs}
            for kind, purpose in PURPOSES.items():
                pairs = demonstrations(tokenizer, recipe.sft.parts, f"{recipe.name} {purpose}", SEED)
                with torch.no_grad():
                    found = [
                        confidence(model, batch)
                        for batch in batches_for(model, batches(pairs, end_of(tokenizer)))
                    ]
                row[kind] = {"nll": round(mean_nll(found), 5), "entropy": round(mean_entropy(found), 5)}
            yield row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m studies.real.seen", description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/real"), help="models, default runs/real")
    parser.add_argument("--recipes", nargs="+", default=["V", "X"], choices=RECIPES, help="default V X")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/seen.json"), help="default docs/results/seen.json"
    )
    options = parser.parse_args()
    found = []
    for row in rows(Workspace(options.cache / "pretrained", options.cache), options.recipes):
        found.append(row)
        ratios = {kind: row[kind]["entropy"] / row[kind]["nll"] for kind in PURPOSES}
        print(
            row["recipe"],
            row["epochs"],
            {kind: round(ratio, 2) for kind, ratio in ratios.items()},
            flush=True,
        )
    options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")


if __name__ == "__main__":
    main()
