"""The stages of `examples/sft_to_rl` with constructors that YAML can express: names, paths and sizes.

How a stage trains is inherited; here it is only built, and its model saved for the next stage.
"""

from __future__ import annotations

from typing import Literal

import lightning as L
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from examples.sft_to_rl.grpo import GRPO
from examples.sft_to_rl.model import build_model, load_model, save_model
from examples.sft_to_rl.pretrain import Pretraining
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.sft import DemonstrationData, SupervisedFineTuning, held_out_demonstrations
from examples.sft_to_rl.tasks import get_task
from examples.sft_to_rl.tasks.base import Recipe

TaskName = Literal["retail_desk", "running_total"]


class Stage(L.LightningModule):
    """A stage that ends in a Hugging Face directory, which the next one starts from."""

    model: LlamaForCausalLM
    save_to: str

    def on_fit_end(self) -> None:
        """Save the model; callbacks have done with it, also one that edits it at the end of the fit."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            save_model(self.model, self.save_to)
            print(f"Saved the model to {self.save_to}")


class PretrainingStage(Stage, Pretraining):
    """A small Llama from scratch: Muon and AdamW on scripted documents. Train it for one epoch.

    Args:
        save_to: directory for the base.
        task: whose documents.
        seed: of the initial weights and the documents.
        steps: how many on easier documents, then how many on the full mixture; by default the task's own.
    """

    def __init__(
        self,
        save_to: str,
        task: TaskName = "retail_desk",
        seed: int = 1,
        steps: tuple[int, int] | None = None,
    ) -> None:
        chosen = get_task(task)
        recipe = chosen.recipe
        if steps is not None:
            recipe = Recipe(steps, max(1, steps[1] * 7 // 10), recipe.demonstrations, 1, 1)
        super().__init__(build_model(len(chosen.vocabulary), seed), chosen, recipe, seed)
        self.save_to = save_to


class SFTStage(Stage, SupervisedFineTuning):
    """Supervised fine-tuning on narrow demonstrations: AdamW at a constant 5e-4.

    Args:
        checkpoint: directory of the model to start from, the base.
        save_to: directory for the model at the end of the fit.
        task: whose demonstrations.
        seed: of the demonstrations and their order.
        demonstrations: how many there are; a batch is 32.
        held_out: how many others the rejuvenation is calibrated on.
    """

    def __init__(
        self,
        checkpoint: str,
        save_to: str,
        task: TaskName = "retail_desk",
        seed: int = 1,
        demonstrations: int = 128,
        held_out: int = 64,
    ) -> None:
        super().__init__(load_model(checkpoint), save_at={})
        self.save_to = save_to
        self.task, self.seed, self.held_out = get_task(task), seed, held_out
        self.demonstrations = DemonstrationData(self.task, demonstrations, seed)

    def train_dataloader(self) -> DataLoader:
        """The demonstrations, reshuffled every epoch."""
        self.demonstrations.setup("fit")
        return self.demonstrations.train_dataloader()

    def calibration_dataloader(self) -> DataLoader:
        """Held-out demonstrations on which `RejuvenationCallback` checks alpha and chooses neurons."""
        return DataLoader(held_out_demonstrations(self.task, self.held_out, self.seed), batch_size=None)


class RLStage(Stage, GRPO):
    """GRPO with verified rewards: AdamW at a constant 5e-4, two minibatches a step. Train it for one epoch.

    Args:
        checkpoint: directory of the model to start from.
        save_to: directory for the model at the end of the fit.
        task: where problems and rewards come from.
        seed: of problems, sampler and minibatches.
        rl_steps: steps of the epoch.
        prompts: prompts a step.
        group: samples a prompt.
        held_out: demonstrations on which the rejuvenation is calibrated.
        responses: prompts on which the base is sampled to find alpha.
    """

    def __init__(
        self,
        checkpoint: str,
        save_to: str,
        task: TaskName = "retail_desk",
        seed: int = 1,
        rl_steps: int = 40,
        prompts: int = 16,
        group: int = 8,
        held_out: int = 64,
        responses: int = 96,
    ) -> None:
        settings = Settings(rl_steps, prompts, group, held_out=held_out, responses=responses)
        super().__init__(load_model(checkpoint), get_task(task), settings, seed)
        self.save_to = save_to
