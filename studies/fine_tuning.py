"""Training before RL: the SFT ladder, other SFT of the base, and a refit of the base itself."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.sft_to_rl import sft
from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.tasks.documents import Batch, concatenate
from examples.sft_to_rl.training import Run, make_trainer
from lightning_rejuv import Refit
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.calibration.regroup import Pool
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.refit_steps import train
from studies.arms import EPOCHS
from studies.record import digest_of

REPLAYED = 0.1  # base responses that replay mixes in, as a share of the demonstrations
KL_WEIGHT = 0.3  # of the divergence from the base, beside a cross-entropy in nats per token


def refit_of(steps: int) -> Refit:
    """The library's refit with the ladder's learning rate and batch size, whatever its defaults are."""
    return Refit(steps, learning_rate=5e-4, batch_size=sft.BATCH_SIZE)


def refit_in_place(
    model: LlamaForCausalLM, demonstrations: Sequence[Batch], samples: Batch, refit: Refit, seed: int
) -> None:
    """The steps of the library's refit on a model that there is nothing to rejuvenate in: the base.

    Data, order and optimiser are those of ``rejuvenate(..., alpha=1.0, refit=refit, seed=seed)``.

    Args:
        model: Trained in place; it keeps its mode.
        demonstrations: Held-out demonstrations.
        samples: Responses that the base sampled.
        refit: How many steps, and of which size.
        seed: Of the order.
    """
    pool = Pool([*batches_for(model, demonstrations), *batches_for(model, [samples], "sampled")])
    draws = pool.draws(min(refit.batch_size, len(pool)), refit.steps, seed)
    assert refit.learning_rate is not None
    with evaluation_mode(model):
        train(model, dict(model.named_parameters()), draws, refit.learning_rate, lambda *_: None)


class ReplayData(sft.DemonstrationData):
    """The demonstrations of one seed and the first of the base's own responses, shuffled together every epoch.

    Args:
        run: Task, seed and sizes.
        responses: What the base sampled to held-out prompts; of them as many are taken as a tenth of the
            demonstrations, rounded, or all there are.
    """

    def __init__(self, run: Run, responses: Batch) -> None:
        super().__init__(run.task, run.settings.recipe_of(run.task).demonstrations, run.seed)
        replayed = round(REPLAYED * self.count)
        self.replayed = {key: rows[:replayed] for key, rows in responses.items()}

    def setup(self, stage: str) -> None:
        """Write the demonstrations, and the base's responses after them."""
        super().setup(stage)
        self.dataset = sft.Demonstrations(concatenate([self.dataset.batch, self.replayed]))


class AnchoredFineTuning(sft.SupervisedFineTuning):
    """SFT with 0.3 × KL(base ‖ model) added to its loss, the exact divergence on the demonstrations' agent tokens.

    Args:
        model: The model, which begins as the base.
        base: The base, which stays.
        save_at: Directory of the Hugging Face checkpoint to write after each of these epochs.
    """

    def __init__(self, model: LlamaForCausalLM, base: LlamaForCausalLM, save_at: Mapping[int, Path]) -> None:
        super().__init__(model, save_at)
        self.__dict__["base"] = base.eval()  # no submodule: neither trained nor saved

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy and divergence, each the mean over the agent's tokens of the batch, in nats."""
        output = self.model(**batch, use_cache=False)
        base: LlamaForCausalLM = self.__dict__["base"].to(self.device)
        with torch.no_grad():
            anchor = base(input_ids=batch["input_ids"], use_cache=False).logits.log_softmax(-1)
        predicted = batch["labels"][:, 1:] != -100
        log_probs = output.logits.log_softmax(-1)
        divergence = (anchor.exp() * (anchor - log_probs)).sum(-1)[:, :-1][predicted].mean()
        self.log("sft/loss", output.loss.detach(), prog_bar=True)
        return output.loss + KL_WEIGHT * divergence


def sft_ladder(run: Run, base: Path) -> dict[str, Path]:
    """The checkpoints after each number of epochs, saved in one SFT run; trained now or found in the cache."""
    recipe = run.settings.recipe_of(run.task)
    digest = hashlib.sha256(json.dumps([digest_of(base), repr(run.task), recipe.demonstrations]).encode())
    digest.update(Path(sft.__file__).read_bytes())
    directory = run.cache / f"{base.name}-sft-{digest.hexdigest()[:12]}"
    if not directory.is_dir():
        data = sft.DemonstrationData(run.task, recipe.demonstrations, run.seed)
        unfinished = _unfinished(run)
        saved = {n: unfinished / f"sft_{n}" for n in EPOCHS}
        _fit(run, sft.SupervisedFineTuning(load_model(base), saved), data)
        os.replace(unfinished, directory)
    return {f"sft_{n}": directory / f"sft_{n}" for n in EPOCHS}


def other_sft(run: Run, base: Path, kind: str, responses: Batch) -> tuple[Path, int]:
    """SFT of the base for as many epochs as the ladder's last checkpoint, with its optimiser and its order.

    Args:
        run: Task, seed, sizes, cache, device.
        base: The base's checkpoint.
        kind: ``"replay"``, with base responses mixed in; or ``"kl"``, with a divergence from the base in the loss.
        responses: What the base sampled to held-out prompts, for ``"replay"``.

    Returns:
        The checkpoint, trained now or found in the cache, and how many steps it was trained for.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in ("replay", "kl"):
        raise ValueError(f"Expected `kind` to be 'replay' or 'kl' but got {kind!r}.")
    epochs, recipe = max(EPOCHS), run.settings.recipe_of(run.task)
    data = (
        ReplayData(run, responses)
        if kind == "replay"
        else sft.DemonstrationData(run.task, recipe.demonstrations, run.seed)
    )
    sizes = [recipe.demonstrations, run.settings.responses, epochs]
    ingredients = [kind, digest_of(base), repr(run.task), *sizes]
    digest = hashlib.sha256(json.dumps(ingredients).encode())
    for source in (sft.__file__, __file__):
        digest.update(Path(source).read_bytes())
    directory = run.cache / f"{base.name}-sft-{kind}-{digest.hexdigest()[:12]}"
    data.setup("fit")
    steps = epochs * len(data.train_dataloader())
    if not directory.is_dir():
        unfinished = _unfinished(run)
        model, saved = load_model(base), {epochs: unfinished}
        module = (
            AnchoredFineTuning(model, load_model(base), saved)
            if kind == "kl"
            else sft.SupervisedFineTuning(model, saved)
        )
        made = _fit(run, module, data)
        assert made == steps
        os.replace(unfinished, directory)
    return directory, steps


def _unfinished(run: Run) -> Path:
    return Path(tempfile.mkdtemp(dir=run.cache, prefix="unfinished-"))


def _fit(run: Run, module: sft.SupervisedFineTuning, data: sft.DemonstrationData) -> int:
    steps = data.count // sft.BATCH_SIZE
    trainer, _ = make_trainer(run, "sft", epochs=max(EPOCHS), log_every=steps)
    trainer.fit(module, datamodule=data)
    return trainer.global_step
