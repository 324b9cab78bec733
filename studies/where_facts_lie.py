"""Where the price desk's prices lie: ``python -m studies.where_facts_lie``.

It prints how many of the prices that SFT teaches are known when the input embeddings of excessive SFT and everything
else come from different models. Checkpoints come from the cache of `studies.run`, or are trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.pipeline import pretrained_base
from examples.sft_to_rl.training import Run, silence
from lightning_rejuv import rejuvenate
from studies.analysis.markdown import plus_minus, table
from studies.analysis.statistics import mean
from studies.arms import EDITION_2_SEEDS, EXCESSIVE
from studies.fine_tuning import sft_ladder
from studies.knowledge import knowledge
from studies.sizes import sizes

EMBEDDINGS = "*embed_tokens*"
ALPHAS: dict[str, dict[str, float]] = {
    "excessive SFT": {"*": 1.0},
    "excessive SFT with the base's input embeddings": {EMBEDDINGS: 0.0, "*": 1.0},
    "the base with the input embeddings of excessive SFT": {EMBEDDINGS: 1.0, "*": 0.0},
    "fusion at 0.4": {"*": 0.4},
    "fusion at 0.4 with the input embeddings of excessive SFT": {EMBEDDINGS: 1.0, "*": 0.4},
    "the base": {"*": 0.0},
}


def known(run: Run) -> dict[str, float]:
    """Share of the prices that SFT teaches which each of the models knows, on one seed."""
    base, _ = pretrained_base(run)
    excessive = sft_ladder(run, base)[EXCESSIVE]
    shares = {}
    for name, alpha in ALPHAS.items():
        model = load_model(excessive)
        if set(alpha.values()) != {1.0}:
            rejuvenate(model, base, alpha=alpha)
        found = knowledge(model.eval(), run.task)
        shares[name] = (found["asked"]["right"] + found["unasked"]["right"]) / 2  # as many of each
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.where_facts_lie", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(EDITION_2_SEEDS))
    parser.add_argument("--cache", type=Path, default=Path("runs/study"))
    parser.add_argument("--miniature", action="store_true", help="all stages in seconds; nothing is learned")
    options = parser.parse_args(arguments)
    silence()
    found = []
    for seed in options.seeds:
        task, settings = sizes("price_desk", miniature=options.miniature, seed=seed)
        found.append(known(Run(task, seed, settings, options.cache, options.cache, tensorboard=False)))
    rows = [[name, plus_minus(mean([shares[name] for shares in found])._asdict())] for name in ALPHAS]
    print(table(["model", f"prices known (n = {len(found)})"], rows))


if __name__ == "__main__":
    main()
