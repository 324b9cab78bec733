"""Supervised fine-tuning on narrow demonstrations, with a checkpoint after each epoch of the ladder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaForCausalLM

from examples.sft_to_rl.model import save_model
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks import Task
from examples.sft_to_rl.tasks.documents import Batch

BATCH_SIZE = 32


class Demonstrations(Dataset):
    """The rows of one batch of demonstrations."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> Batch:
        return {key: value[index] for key, value in self.batch.items()}


class DemonstrationData(L.LightningDataModule):
    """The demonstrations of one seed, reshuffled every epoch.

    Args:
        task: Whose demonstrations.
        count: How many.
        seed: Of the demonstrations and their order.
    """

    def __init__(self, task: Task, count: int, seed: int) -> None:
        super().__init__()
        self.task, self.count, self.seed = task, count, seed

    def setup(self, stage: str) -> None:
        """Write the demonstrations."""
        self.dataset = Demonstrations(
            self.task.demonstrations(generator(self.seed, "demonstrations"), self.count)
        )

    def train_dataloader(self) -> DataLoader:
        """Full batches only, so that every step weighs the same."""
        order = generator(self.seed, "demonstration order")
        return DataLoader(self.dataset, BATCH_SIZE, shuffle=True, drop_last=True, generator=order)


def held_out_demonstrations(task: Task, count: int, seed: int) -> list[Batch]:
    """Batches of demonstrations that SFT never sees, for calibration and for measuring plasticity."""
    batch = task.demonstrations(generator(seed, "held-out demonstrations"), count)
    parts = {key: value.split(BATCH_SIZE) for key, value in batch.items()}
    return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]


class SupervisedFineTuning(L.LightningModule):
    """Cross-entropy on the agent's tokens, AdamW at a constant 5e-4 without weight decay.

    Args:
        model: The pre-trained base.
        save_at: Directory of the Hugging Face checkpoint to write after each of these epochs.
    """

    def __init__(self, model: LlamaForCausalLM, save_at: Mapping[int, Path]) -> None:
        super().__init__()
        self.model = model
        self.save_at = dict(save_at)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=0.0, fused=True)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean loss over the agent's tokens of the batch."""
        loss = self.model(**batch, use_cache=False).loss
        self.log("sft/loss", loss.detach(), prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Save the checkpoints of the ladder."""
        directory = self.save_at.get(self.current_epoch + 1)
        if directory is not None:
            save_model(self.model, directory)
