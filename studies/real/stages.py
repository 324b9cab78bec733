"""Does one job: trains a base or a ladder, makes and measures a start, reinforces an arm."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_rejuv import Refit, RejuvenationReport, Reset, rejuvenate
from studies.real.arms import ARMS, FOUND, STARTS, Edit
from studies.real.evaluate import evaluate
from studies.real.grpo import GRPO
from studies.real.jobs import Job
from studies.real.knowledge import Knowledge
from studies.real.master import fast_dtype
from studies.real.model import end_of, load_model, load_tokenizer, save_model, whole_directory
from studies.real.recipes import RECIPES, Recipe, Texts
from studies.real.record import Record, where
from studies.real.seeds import seed_of
from studies.real.sft import SupervisedFineTuning
from studies.real.tasks import SPLITS
from studies.real.texts import batches, demonstrations
from studies.real.training import fit
from studies.real.trl_grpo import reinforce_with_trl
from studies.real.workspace import Workspace

Result = dict[str, Any]


@dataclass(frozen=True)
class Stages:
    """What every job is done with.

    Args:
        workspace: Where models lie.
        out: Directory of the results, which jobs only read.
        device: ``cpu`` or ``cuda``.
    """

    workspace: Workspace
    out: Path
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return fast_dtype(self.device)

    def perform(self, job: Job) -> Result | None:
        """Do a job; the result of a start or an arm as plain values."""
        if job.kind == "knowledge":
            tokenizer = load_tokenizer(self.workspace.pretrained)
            model = load_model(self.workspace.pretrained).to(self.device)
            Knowledge(self.workspace.knowledge, tokenizer).ask(model)
            return None
        recipe = RECIPES[job.recipe]
        if job.kind == "base":
            self.train_base(recipe)
            return None
        if job.kind == "ladder":
            self.train_ladder(recipe, job.sft_seed)
            return None
        started, began = time.perf_counter(), time.process_time()
        do = self.make_start if job.kind == "start" else self.reinforce
        result = do(recipe, job)
        result["seconds"] = round(time.perf_counter() - started, 1)
        result["processor_seconds"] = round(time.process_time() - began, 1)
        result["where"] = where(self.device, str(self.dtype).removeprefix("torch."))
        return result

    def train_base(self, recipe: Recipe) -> None:
        """Train the pretrained model on the skill that the recipe's base has."""
        directory = self.workspace.base(recipe)
        if recipe.middle is None or directory.is_dir():
            return
        with tempfile.TemporaryDirectory(dir=_made(directory.parent), prefix="unfinished-") as parent:
            self._train(self.workspace.pretrained, recipe.middle, Path(parent), f"{recipe.name} middle")
            os.replace(Path(parent, f"epoch_{recipe.middle.epochs[-1]}"), directory)

    def train_ladder(self, recipe: Recipe, sft_seed: int) -> None:
        """Fine-tune the recipe's base on the demonstrations of one seed."""
        with whole_directory(self.workspace.ladder(recipe, sft_seed)) as unfinished:
            base, purpose = self.workspace.base(recipe), f"{recipe.name} demonstrations"
            self._train(base, recipe.sft, unfinished, purpose, sft_seed)

    def _train(self, source: Path, texts: Texts, directory: Path, purpose: str, *seeds: int) -> None:
        tokenizer = load_tokenizer(source)

        def save(epoch: int) -> None:
            save_model(module.master, tokenizer, directory / f"epoch_{epoch}")

        pairs = demonstrations(tokenizer, texts.parts, purpose, *seeds)
        order = seed_of(f"order of {purpose}", *seeds)
        module = SupervisedFineTuning(load_model(source), pairs, texts, self.dtype, order, save)
        fit(module, texts.epochs[-1], self.device)

    def make_start(self, recipe: Recipe, job: Job) -> Result:
        """Make the model that RL starts from, if an edit makes it, and measure it."""
        directory = self.workspace.start(recipe, job.sft_seed, job.name)
        tokenizer = load_tokenizer(self.workspace.base(recipe))
        edit, made = STARTS[job.name].edit, None
        if edit is not None:
            # What is there already is of a run that was cut off while it measured: the report of its edit is lost.
            shutil.rmtree(directory, ignore_errors=True)
            source = self.workspace.start(recipe, job.sft_seed, "excessive")
            model = load_model(source).to(self.device)
            made = self._rejuvenate(model, tokenizer, recipe, job, edit)
            save_model(model.cpu(), tokenizer, directory)
        model = load_model(directory)
        return {"edit": made, **self._measure(model, tokenizer, recipe, job.sft_seed)}

    def _rejuvenate(
        self, model: PreTrainedModel, tokenizer: Any, recipe: Recipe, job: Job, edit: Edit
    ) -> Result:
        alpha, sft_seed = edit.alpha, job.sft_seed
        record = Record(self.out, recipe, sft_seed)
        if alpha == FOUND:
            alpha = record.start("fusion")["edit"]["alpha"]
        elif record.has(job):  # the model was deleted, and is made again without another search
            alpha = record.start(job.name)["edit"]["alpha"]
        reset = refit = calibration = None
        if edit.reset_fraction:
            reset = Reset(edit.reset_fraction, rank_by=edit.rank_by)
        if edit.refit_steps:
            refit = Refit(steps=edit.refit_steps, learning_rate=recipe.sft.learning_rate)
        if alpha == "auto" or reset or refit:
            pairs = demonstrations(tokenizer, recipe.sft.parts, f"{recipe.name} calibration", sft_seed)
            calibration = batches(pairs, end_of(tokenizer))
        report = rejuvenate(
            model,
            self.workspace.base(recipe),
            calibration,
            alpha=alpha,
            reset=reset,
            refit=refit,
            seed=sft_seed,
        )
        return _plain(report)

    def reinforce(self, recipe: Recipe, job: Job) -> Result:
        """Reinforce one arm and measure it."""
        arm = ARMS[job.name]
        directory = self.workspace.start(recipe, job.sft_seed, arm.start)
        tokenizer = load_tokenizer(directory)
        rl = dataclasses.replace(
            recipe.rl,
            steps=arm.longer * recipe.rl.steps,
            temperature=arm.temperature,
            entropy_bonus=arm.entropy_bonus,
        )
        problems = SPLITS[rl.split].draw(
            rl.steps * rl.prompts, seed_of(f"{recipe.name} RL problems", job.sft_seed, job.rl_seed)
        )
        samples = seed_of(f"{recipe.name} RL samples", job.sft_seed, job.rl_seed)
        started = time.perf_counter()
        if arm.trainer == "trl":
            model, curves = reinforce_with_trl(directory, tokenizer, problems, rl, self.device, samples)
        else:
            module = GRPO(load_model(directory), tokenizer, problems, rl, self.dtype, samples)
            curves = fit(module, 1, self.device)
            model = module.model
        seconds = time.perf_counter() - started
        return {
            "made": arm.recipe(),
            **self._measure(model, tokenizer, recipe, job.sft_seed),
            "curves": {name: [round(value, 4) for value in curve] for name, curve in curves.items()},
            "responses": rl.steps * rl.prompts * rl.group,
            "seconds_of_rl": round(seconds, 1),
        }

    def _measure(self, model: PreTrainedModel, tokenizer: Any, recipe: Recipe, sft_seed: int) -> Result:
        model = model.to(device=self.device, dtype=self.dtype)
        splits = {
            "id": (recipe.rl.split, recipe.evaluation),
            "ood": (recipe.out_of_distribution, recipe.out_of_distribution_evaluation),
        }
        seed = seed_of(f"{recipe.name} evaluation", sft_seed)
        scores = {
            name: evaluate(model, tokenizer, split, size, recipe.rl.max_new_tokens, seed)
            for name, (split, size) in splits.items()
        }
        return {**scores, "knowledge": Knowledge(self.workspace.knowledge, tokenizer).of(model)}


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _plain(report: RejuvenationReport) -> Result:
    """What the results keep of a report."""
    compared, search = report.comparison, report.search
    return {
        "alpha": report.alpha,
        "search": dataclasses.asdict(search) if search else None,
        "drift_before": report.drift_before,
        "drift_after": report.drift_after,
        "neurons_reset": report.neurons_reset,
        "neurons_total": report.neurons_total,
        "resets": {f"{group.layer}.{group.kind}": group.reset for group in report.neurons if group.reset},
        "positions": {"sharpened": compared.sharpened, "learned": compared.learned}
        if compared and compared.rule
        else None,
        "rejuvenation_seconds": report.seconds,
    }
