"""One seed of one task: base and SFT ladder from the cache or trained now, then one arm after the other."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaForCausalLM

from examples.sft_to_rl.evaluate import Scores
from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.pipeline import pretrained_base
from examples.sft_to_rl.tasks.documents import Batch
from examples.sft_to_rl.training import Run, StartAndEndEvaluation, make_trainer
from lightning_rejuv import RejuvenationReport, Reset, rejuvenate
from lightning_rejuv.alpha.search import AlphaSearch
from studies.arms import ARMS, BARGAIN, Arm
from studies.fine_tuning import other_sft, refit_in_place, refit_of, sft_ladder
from studies.former_rules import find_alpha
from studies.knowledge import knowledge
from studies.measures import Measures, Sampled, respond, rounded, sampled_batch
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


class Start(NamedTuple):
    """What an arm's RL starts from.

    Args:
        model: The model.
        report: What rejuvenation did to it; None without one.
        steps: Training steps that were made on the way: of a refit or of SFT of the arm's own, not of the ladder's.
    """

    model: LlamaForCausalLM
    report: RejuvenationReport | None
    steps: int


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

    def start(self, arm: Arm) -> Start:
        """Make the model that the arm's RL starts from."""
        run, seed, base = self.run, self.run.seed, self.checkpoints["base"]
        options = arm.recipe(run.task.name)
        start, steps, sft = options.pop("start"), options.pop("refit_steps", 0), options.pop("sft", None)
        options.pop("remedy", None)
        if sft is not None:
            checkpoint, trained = other_sft(run, base, sft, self.base_responses)
            return Start(load_model(checkpoint).to(run.device), None, trained)
        model = load_model(self.checkpoints[start]).to(run.device)
        calibration = self.measures.calibration
        refit = refit_of(steps) if steps else None
        if not options:
            if refit is not None:  # of the base, in which there is nothing to rejuvenate
                refit_in_place(model, calibration, self.base_responses, refit, seed)
            return Start(model, None, steps)
        target = options.pop("alpha_target", None)
        if options.pop("support_of", None) is not None:
            target = max(0.0, -self.measures.support.of(self.start(ARMS[arm.support_of]).model))
        search = None
        if options["alpha"] == BARGAIN:
            search = self._search(start)
            options["alpha"] = search.bargain
        elif isinstance(options["alpha"], str):
            rule, sample = options["alpha"], self._responses_of
            options["alpha"] = find_alpha(rule, model, base, sample, target, calibration)
        reset = take_reset(options)
        report = rejuvenate(
            model,
            base,
            calibration if reset or refit else None,
            seed=seed,
            reset=reset,
            refit=refit,
            sampler=(lambda m: [self._responses_of(m)]) if refit else None,
            **options,
        )
        return Start(model, replace(report, search=search), steps)

    @property
    def base_responses(self) -> Batch:
        """What the base samples to held-out prompts."""
        return self.measures.support.rollouts.batch()

    def _responses_of(self, model: LlamaForCausalLM) -> Sampled:
        return sampled_batch(respond(model, self.run.task, self.run.settings, self.run.seed))

    def _search(self, start: str) -> AlphaSearch:
        """What the library's search for alpha says of an SFT model."""
        run = self.run
        report = rejuvenate(
            load_model(self.checkpoints[start]).to(run.device),
            self.checkpoints["base"],
            self.measures.calibration,
            seed=run.seed,
            sampler=lambda m: [self._responses_of(m)],
        )
        assert report.search is not None
        return report.search

    def run_arm(self, arm: Arm) -> dict[str, Any]:
        """Make the start, measure it, reinforce it; the result as plain values, ``seconds`` of processor time."""
        started = time.process_time()
        run = self.run
        model, report, steps = self.start(arm)
        measures = self.measures.of(model)
        known = knowledge(model, run.task)
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
            "rl_responses": module.responses,
            "gradient_steps": trainer.global_step,
            "training_steps_before_rl": steps,
            "measures": {**measures, **dict(rounded(first))},
            **({"knowledge": {"start": known, "end": knowledge(module.model, run.task)}} if known else {}),
            "alpha": round(report.alpha, 5) if report and isinstance(report.alpha, float) else None,
            **({"search": asdict(report.search)} if report and report.search else {}),
            "neurons_reset": report.neurons_reset if report else 0,
            "neurons_total": report.neurons_total if report else 0,
            "resets": reset,
            "positions": positions,
            "seconds": round(time.process_time() - started, 2),
        }


def _plain(scores: Scores) -> dict[str, float]:
    return {name: round(value, 5) for name, value in scores.items()}
