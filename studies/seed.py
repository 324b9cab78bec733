"""One seed of one task: base and SFT ladder from the cache or trained now, then one arm after the other."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from examples.sft_to_rl import sft
from examples.sft_to_rl.evaluate import Scores
from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.pipeline import pretrained_base
from examples.sft_to_rl.training import Run, StartAndEndEvaluation, make_trainer
from lightning_rejuv import RejuvenationReport, Reset, rejuvenate
from lightning_rejuv.alpha.search import AlphaSearch
from studies.arms import ARMS, BARGAIN, EPOCHS, Arm
from studies.former_rules import find_alpha
from studies.measures import Measures, respond, rounded, sampled_batch
from studies.record import Record, digest_of
from studies.remedies import make_rl

# What an arm's options leave open: the library's defaults when the study began. The study does not follow them.
PINNED: dict[str, Any] = {"quantity": "target_logit", "rank_by": "absolute"}


def take_reset(recipe: dict[str, Any]) -> Reset | None:
    """Take what a recipe says of a reset out of it, and return it as the library's."""
    said = {field.name: recipe.pop(field.name) for field in fields(Reset) if field.name in recipe}
    fraction = recipe.pop("reset_fraction")
    return Reset(fraction, **{**PINNED, **said}) if fraction else None


def run_arms(run: Run, root: Path, names: tuple[str, ...], finished: Callable[[str], None]) -> None:
    """Run the named arms of one seed that have no result yet.

    Args:
        run: Task, seed, sizes, cache, device.
        root: Directory of the study's results.
        names: Arms, in the order in which they are run.
        finished: Called with one line after each arm.

    Raises:
        ValueError: If results are there that do not belong to these settings, this base or these arms.
        RuntimeError: After all other arms, if some could not be run.
    """
    record = Record(root, run.task, run.seed, run.settings)
    recipes = {name: ARMS[name].recipe(run.task.name) for name in ARMS}
    missing = record.missing(names, recipes)
    if not missing:
        return
    base, _ = pretrained_base(run)
    stage = Stage(run, {"base": base, **sft_ladder(run, base)})
    record.of_base(digest_of(base), stage.measures.support.summary())
    failures = []
    for name in missing:
        twin = next((n for n, r in record.arms.items() if r["made"] == recipes[name]), None)
        if twin is not None:
            record.add(name, {**record.arms[twin], "same_as": twin})
            finished(f"{run.label} {name}: the same as {twin}")
            continue
        try:
            result = {**stage.run_arm(ARMS[name]), "made": recipes[name]}
        except Exception:
            failures.append(f"{name}: {traceback.format_exc()}")
            continue
        record.add(name, result)
        changes = []
        for split in ("id", "ood"):
            start, end = (result[split][moment]["pass_at_1"] for moment in ("start", "end"))
            changes.append(f"{split.upper()} {start:.2f} -> {end:.2f}")
        finished(f"{run.label} {name}: pass@1 {', '.join(changes)}; {result['seconds']:.1f} s")
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(missing)} arms failed.\n" + "\n".join(failures))


def sft_ladder(run: Run, base: Path) -> dict[str, Path]:
    """The checkpoints after each number of epochs, saved in one SFT run; trained now or found in the cache."""
    recipe = run.settings.recipe_of(run.task)
    digest = hashlib.sha256(json.dumps([digest_of(base), repr(run.task), recipe.demonstrations]).encode())
    digest.update(Path(sft.__file__).read_bytes())
    directory = run.cache / f"{base.name}-sft-{digest.hexdigest()[:12]}"
    if not directory.is_dir():
        unfinished = Path(tempfile.mkdtemp(dir=run.cache, prefix="unfinished-"))
        module = sft.SupervisedFineTuning(load_model(base), {n: unfinished / f"sft_{n}" for n in EPOCHS})
        steps = recipe.demonstrations // sft.BATCH_SIZE
        trainer, _ = make_trainer(run, "sft", epochs=max(EPOCHS), log_every=steps)
        trainer.fit(module, datamodule=sft.DemonstrationData(run.task, recipe.demonstrations, run.seed))
        os.replace(unfinished, directory)
    return {f"sft_{n}": directory / f"sft_{n}" for n in EPOCHS}


class Stage:
    """Where the arms of one seed start.

    Args:
        run: Task, seed, sizes, cache, device.
        checkpoints: ``base`` and the SFT ladder.
    """

    def __init__(self, run: Run, checkpoints: dict[str, Path]) -> None:
        self.run = run
        self.checkpoints = checkpoints
        self.measures = Measures(checkpoints["base"], run.task, run.settings, run.seed, run.device)

    def start(self, arm: Arm) -> tuple[LlamaForCausalLM, RejuvenationReport | None]:
        """The model that the arm's RL starts from, and what rejuvenation did to it."""
        run = self.run
        model = load_model(self.checkpoints[arm.start]).to(run.device)
        options = {k: v for k, v in arm.recipe(run.task.name).items() if k not in ("start", "remedy")}
        if not options:
            return model, None
        target = options.pop("alpha_target", None)
        if options.pop("support_of", None) is not None:
            model_of, _ = self.start(ARMS[arm.support_of])
            target = max(0.0, -self.measures.support.of(model_of))
        search = None
        if options["alpha"] == BARGAIN:
            search = self._search(arm)
            options["alpha"] = search.bargain
        elif isinstance(options["alpha"], str):
            options["alpha"] = find_alpha(
                options["alpha"],
                model,
                self.checkpoints["base"],
                lambda m: sampled_batch(respond(m, run.task, run.settings, run.seed)),
                target,
            )
        base = self.checkpoints["base"]
        reset = take_reset(options)
        calibration = self.measures.calibration if reset else None
        report = rejuvenate(model, base, calibration, seed=run.seed, reset=reset, **options)
        return model, replace(report, search=search)

    def _search(self, arm: Arm) -> AlphaSearch:
        """What the library's search for alpha says of the arm's SFT model."""
        run = self.run
        report = rejuvenate(
            load_model(self.checkpoints[arm.start]).to(run.device),
            self.checkpoints["base"],
            self.measures.calibration,
            seed=run.seed,
            sampler=lambda m: [sampled_batch(respond(m, run.task, run.settings, run.seed))],
        )
        assert report.search is not None
        return report.search

    def run_arm(self, arm: Arm) -> dict[str, Any]:
        """Make the start, measure it, reinforce it; the result as plain values, ``seconds`` of processor time."""
        started = time.process_time()
        run = self.run
        model, report = self.start(arm)
        measures = self.measures.of(model)
        base = self.checkpoints["base"]
        module = make_rl(arm.remedy, model, run.task, run.settings, run.seed, base)
        evaluation = StartAndEndEvaluation(run)
        trainer, curves = make_trainer(run, "rl", epochs=1, log_every=1, callbacks=[evaluation])
        trainer.fit(module)

        reset = {f"{g.layer}.{g.kind}": g.reset for g in report.neurons if g.reset} if report else {}
        compared = report.comparison if report else None
        positions = (
            {"sharpened": compared.sharpened, "learned": compared.learned}
            if compared and compared.rule
            else None
        )
        at_start = evaluation.start["id"]
        first = {
            "pass_at_8_minus_1": at_start["pass_at_k"] - at_start["pass_at_1"],
            "zero_variance_groups": curves.values["rl/zero_variance_groups"][0],
            "first_grad_norm": curves.values["rl/grad_norm"][0],
        }
        return {
            **{
                s: {"start": _plain(evaluation.start[s]), "end": _plain(evaluation.end[s])}
                for s in ("id", "ood")
            },
            "reward": [round(value, 5) for value in curves.values["rl/reward"]],
            "rl_responses": module.settings.rl_budget,
            "measures": {**measures, **dict(rounded(first))},
            "alpha": round(report.alpha, 5) if report else None,
            **({"search": asdict(report.search)} if report and report.search else {}),
            "neurons_reset": report.neurons_reset if report else 0,
            "neurons_total": report.neurons_total if report else 0,
            "resets": reset,
            "positions": positions,
            "seconds": round(time.process_time() - started, 2),
        }


def _plain(scores: Scores) -> dict[str, float]:
    return {name: round(value, 5) for name, value in scores.items()}
