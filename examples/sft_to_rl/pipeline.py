"""One seed of one task, from scratch to the last evaluation: pre-training → SFT → four arms of GRPO."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from examples.sft_to_rl import model as model_module
from examples.sft_to_rl import muon, pretrain, tasks
from examples.sft_to_rl.arms import ARMS
from examples.sft_to_rl.grpo import GRPO
from examples.sft_to_rl.model import build_model, load_model, save_model
from examples.sft_to_rl.sft import (
    BATCH_SIZE,
    DemonstrationData,
    SupervisedFineTuning,
    held_out_demonstrations,
)
from examples.sft_to_rl.training import Run, StartAndEndEvaluation, make_trainer
from lightning_rejuv import (
    PlasticityCallback,
    PlasticityMonitor,
    RejuvenationCallback,
    RejuvenationReport,
    Reset,
)

RL_MEASURE_EVERY = 5  # RL steps between two measurements of plasticity


def run_seed(run: Run) -> dict[str, Any]:
    """Run every stage and return plain results, ready for JSON."""
    started = time.monotonic()
    with warnings.catch_warnings():
        # One line each, between the bars: the library's warnings belong to the story.
        warnings.showwarning = lambda message, *_: run.say(f"warning: {message}")
        base, pretraining_seconds = pretrained_base(run)
        checkpoints, sft = fine_tune(run, base)
        arms = {arm: reinforce(run, arm, base, checkpoints) for arm in ARMS}
    seconds = {"pretraining": pretraining_seconds, "sft": sft.pop("seconds")}
    return {
        "task": run.task.name,
        "seed": run.seed,
        "arms": arms,
        "sft": sft,
        "seconds": {**seconds, "total": round(time.monotonic() - started, 1)},
    }


def recipe_digest(run: Run) -> str:
    """Digest of everything that a base depends on: its recipe, and the source of the files that train it."""
    recipe = run.settings.recipe_of(run.task)
    shape = dataclasses.asdict(run.settings.shape)
    ingredients = [repr(run.task), run.seed, recipe.pretraining_steps, recipe.decay_steps, shape]
    digest = hashlib.sha256(json.dumps(ingredients).encode())
    sources = {Path(module.__file__) for module in (model_module, muon, pretrain)}
    sources |= {*Path(tasks.__file__).parent.glob("*.py"), Path(inspect.getfile(type(run.task)))}
    for source in sorted(sources, key=lambda path: path.name):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def pretrained_base(run: Run) -> tuple[Path, float]:
    """The base's Hugging Face directory, trained now or found in the cache; and the seconds it took."""
    directory = run.cache / f"{run.task.name}-seed{run.seed}-{recipe_digest(run)}"
    if directory.is_dir():
        run.say(f"base: found in {directory}")
        return directory, 0.0
    started = time.monotonic()
    recipe = run.settings.recipe_of(run.task)
    steps = sum(recipe.pretraining_steps)
    model = build_model(len(run.task.vocabulary), run.seed, run.settings.shape, run.task.positions)
    module = pretrain.Pretraining(model, run.task, recipe, run.seed)
    trainer, _ = make_trainer(run, "pretrain", epochs=1, log_every=min(20, steps))
    trainer.fit(module)

    # Written beside its final name and then renamed: an interrupted demo leaves no half base behind.
    run.cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=run.cache, prefix="unfinished-"))
    save_model(module.model, unfinished)
    os.replace(unfinished, directory)
    seconds = round(time.monotonic() - started, 1)
    run.say(f"base pre-trained for {steps} steps ({seconds:.0f} s)")
    return directory, seconds


def plasticity_callback(run: Run, base: Path, every: int, figures: bool = False) -> PlasticityCallback:
    """Measures plasticity against `base` on held-out demonstrations; maps of the layers take seconds to draw."""
    probe = held_out_demonstrations(run.task, run.settings.held_out, run.seed)
    monitor = PlasticityMonitor(anchor=base, probe=probe, pass_at=(1, run.settings.group))
    return PlasticityCallback(monitor, every_n_steps=every, figure_every_n_steps=500 if figures else 0)


def fine_tune(run: Run, base: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """One SFT run with two checkpoints; returns their directories, and entropy and drift over its epochs."""
    started = time.monotonic()
    recipe = run.settings.recipe_of(run.task)
    checkpoints = {name: run.directory("checkpoints") / name for name in ("modsft", "oversft")}
    ladder = {recipe.moderate_epochs: checkpoints["modsft"], recipe.excessive_epochs: checkpoints["oversft"]}
    steps_per_epoch = recipe.demonstrations // BATCH_SIZE
    trainer, curves = make_trainer(
        run,
        "sft",
        epochs=recipe.excessive_epochs,
        log_every=steps_per_epoch,
        callbacks=[plasticity_callback(run, base, every=steps_per_epoch, figures=True)],
    )
    data = DemonstrationData(run.task, recipe.demonstrations, run.seed)
    trainer.fit(SupervisedFineTuning(load_model(base), ladder), datamodule=data)
    seconds = round(time.monotonic() - started, 1)
    run.say(f"SFT, checkpoints after {' and '.join(map(str, ladder))} epochs ({seconds:.0f} s)")
    history: dict[str, Any] = {"seconds": seconds, "moderate_epochs": recipe.moderate_epochs}
    for name in ("token_entropy", "relative_drift"):
        key = f"plasticity/{name}"
        history[name] = {
            "epoch": [step / steps_per_epoch for step in curves.steps[key]],
            "value": curves.values[key],
        }
    return checkpoints, history


def reinforce(run: Run, arm: str, base: Path, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """The same GRPO from one start; `rejuvenated` starts from `oversft` and differs by one callback."""
    started = time.monotonic()
    start = {"base": base, **checkpoints, "rejuvenated": checkpoints["oversft"]}[arm]
    module = GRPO(load_model(start), run.task, run.settings, run.seed)
    evaluation = StartAndEndEvaluation(run)
    callbacks = [evaluation, plasticity_callback(run, base, every=RL_MEASURE_EVERY)]
    rejuvenation = None
    if arm == "rejuvenated":
        # The reset is off by default; on this task RL learns faster with it.
        rejuvenation = RejuvenationCallback(anchor=base, at_start=True, reset=Reset(fraction=0.02))
        callbacks.insert(0, rejuvenation)
    trainer, curves = make_trainer(run, arm, epochs=1, log_every=1, callbacks=callbacks)
    trainer.fit(module)

    result: dict[str, Any] = {
        split: {"start": evaluation.start[split], "end": evaluation.end[split]} for split in evaluation.end
    }
    result["curves"] = {
        key.removeprefix("rl/"): values for key, values in curves.values.items() if key.startswith("rl/")
    }
    result["seconds"] = round(time.monotonic() - started, 1)
    if rejuvenation is not None:
        result["rejuvenation"] = summary_of(rejuvenation.report)
    scores = {s: [result[s][moment]["pass_at_1"] for moment in ("start", "end")] for s in ("id", "ood")}
    changes = ", ".join(f"{s.upper()} {start:.2f} -> {end:.2f}" for s, (start, end) in scores.items())
    run.say(f"{arm} + GRPO: pass@1 {changes} ({result['seconds']:.0f} s)")
    return result


def summary_of(report: RejuvenationReport) -> dict[str, float]:
    """The figures of a rejuvenation that the summary shows; the whole report lies beside the arm's events."""
    return {
        "alpha": report.alpha,
        "neurons_reset": report.neurons_reset,
        "relative_drift": report.drift_after,
        "token_entropy": report.comparison.entropy_after,
    }
