"""What other resets do to a start, before any RL, on SFT seeds that judge nothing: ``python -m studies.real.resets``.

The excessive checkpoint of a recipe is rejuvenated in many ways, and every model is sampled from on the same problems.
One JSON line for each; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv import Reset, rejuvenate
from studies.real.evaluate import evaluate
from studies.real.jobs import Job, with_needs
from studies.real.master import fast_dtype
from studies.real.model import end_of, load_model, load_tokenizer
from studies.real.recipes import RECIPES, Recipe
from studies.real.record import where
from studies.real.run import add_places, check_base, prepared
from studies.real.sampling import sample
from studies.real.seeds import seed_of
from studies.real.stages import Stages
from studies.real.texts import Pair, batches, demonstrations
from studies.real.workspace import Workspace

ALPHAS = (0.4, 0.5, 0.6)
LONGEST = 60  # tokens of a sample of the base


@dataclass(frozen=True)
class Way:
    """One way to choose neurons.

    Args:
        name: In words.
        reset: What is asked of `lightning_rejuv.rejuvenate`; None for fusion alone.
        on_samples: Whether neurons are attributed on the base's own samples, not on demonstrations.
    """

    name: str
    reset: Reset | None
    on_samples: bool = False


RESETS = (
    Way("none", None),
    Way("the default, 2 %", Reset(0.02)),
    Way("random neurons, 2 %", Reset(0.02, rank_by="random")),
    # The paper's ranking; its budget is another.
    Way(
        "the target logit's at the largest entropy gaps, 2 %",
        Reset(0.02, positions="entropy_gap", quantity="target_logit"),
    ),
    Way("on the base's samples, 2 %", Reset(0.02, positions="entropy_gap"), on_samples=True),
    Way("the default, 0.5 %", Reset(0.005)),
    Way("the default, 8 %", Reset(0.08)),
    Way("random neurons, 8 %", Reset(0.08, rank_by="random")),
)


def measure(recipe: Recipe, sft_seed: int, stages: Stages, done: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Yield a line for every alpha and reset that is not done.

    Args:
        recipe: Whose base and excessive checkpoint; they are trained if they are not there.
        sft_seed: Of SFT, demonstrations and evaluation.
        stages: Where models lie, and what is computed with.
        done: Keys of lines that are there.
    """
    for job in with_needs([Job("ladder", recipe.name, sft_seed)], stages.workspace.is_done):
        stages.perform(job)
    base = stages.workspace.base(recipe)
    excessive = stages.workspace.start(recipe, sft_seed, "excessive")
    tokenizer = load_tokenizer(base)
    end, device = end_of(tokenizer), stages.device
    shown = demonstrations(tokenizer, recipe.sft.parts, f"{recipe.name} calibration", sft_seed)
    own = _samples_of(base, tokenizer, shown, device, sft_seed)
    problems = seed_of(f"{recipe.name} evaluation", sft_seed)
    for alpha in ALPHAS:
        for way in RESETS:
            if _key(recipe.name, sft_seed, alpha, way.name) in done:
                continue
            model = load_model(excessive).to(device)
            data = batches(own if way.on_samples else shown, end) if way.reset else None
            report = rejuvenate(model, base, data, alpha=alpha, seed=sft_seed, reset=way.reset)
            model = model.to(fast_dtype(device))
            scores = evaluate(
                model, tokenizer, recipe.rl.split, recipe.evaluation, recipe.rl.max_new_tokens, problems
            )
            yield {
                "recipe": recipe.name,
                "sft_seed": sft_seed,
                "alpha": alpha,
                "reset": way.name,
                "neurons_reset": report.neurons_reset,
                **scores,
            }


def _samples_of(base: Path, tokenizer: Any, shown: Sequence[Pair], device: str, seed: int) -> list[Pair]:
    """The base's own responses to the prompts of the demonstrations."""
    prompts = [pair.prompt for pair in shown]
    generator = torch.Generator().manual_seed(seed_of("samples of the base", seed))
    model = load_model(base).to(device)
    found = sample(model, prompts, 1, LONGEST, end=end_of(tokenizer), generator=generator)
    return [Pair(prompt, tokens) for prompt, tokens in zip(prompts, found.tokens, strict=True)]


def _key(recipe: str, sft_seed: int, alpha: float, reset: str) -> str:
    return f"{recipe} {sft_seed} {alpha} {reset}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing of one recipe and seed."""
    parser = argparse.ArgumentParser(prog="python -m studies.real.resets", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="V", choices=RECIPES, help="default V")
    parser.add_argument("--seed", type=int, default=901, help="of SFT, default 901")
    add_places(parser, Path("docs/results/real_resets"))
    options = parser.parse_args(arguments)
    check_base(parser, options)
    stages = prepared(Workspace(options.base, options.cache), options.out, options.device)
    path = options.out / f"{options.recipe}_{options.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = frozenset(_key(line["recipe"], line["sft_seed"], line["alpha"], line["reset"]) for line in lines)
    began = time.perf_counter()
    at = where(options.device, str(stages.dtype).removeprefix("torch."))
    for line in measure(RECIPES[options.recipe], options.seed, stages, done):
        with path.open("a") as file:
            file.write(json.dumps({**line, "where": at}) + "\n")
        print(f"{time.perf_counter() - began:.0f} s: {line}", flush=True)


if __name__ == "__main__":
    main()
