"""Pre-training of the small base: Muon on the layer matrices, AdamW on embedding, head and norms."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM

from examples.sft_to_rl.muon import Muon
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks import Task
from examples.sft_to_rl.tasks.base import Recipe
from examples.sft_to_rl.tasks.documents import Batch

BATCH_SIZE = 64
WARM_UP_STEPS = 30
MUON_LR, ADAMW_LR = 0.02, 3e-3


class DocumentStream(IterableDataset):
    """Fresh documents in every batch: first the warm-up phase, then the full mixture."""

    def __init__(self, task: Task, recipe: Recipe, seed: int) -> None:
        self.task, self.recipe, self.seed = task, recipe, seed

    def __len__(self) -> int:
        return sum(self.recipe.pretraining_steps)

    def __iter__(self) -> Iterator[Batch]:
        draws = generator(self.seed, "pre-training documents")
        for step in range(len(self)):
            warm_up = step < self.recipe.pretraining_steps[0]
            yield self.task.pretraining_documents(draws, BATCH_SIZE, warm_up=warm_up)


class Pretraining(L.LightningModule):
    """Next-token prediction on the agent's tokens of scripted documents.

    Manual optimisation, since two optimizers share one backward pass. Train it for one epoch.

    Args:
        model: A freshly initialised model.
        task: Where the documents come from.
        recipe: How many steps.
        seed: Of the documents.
    """

    def __init__(self, model: LlamaForCausalLM, task: Task, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.documents = DocumentStream(task, recipe, seed)

    def train_dataloader(self) -> DataLoader:
        """The document stream, which makes whole batches itself."""
        return DataLoader(self.documents, batch_size=None)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon and AdamW."""
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if ".layers." in name and p.ndim == 2]
        others = [p for name, p in named.items() if not (".layers." in name and p.ndim == 2)]
        adamw = torch.optim.AdamW(others, ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        return [Muon(matrices, lr=MUON_LR, weight_decay=0.01), adamw]

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to 5%."""
        remaining = (len(self.documents) - step) / self.documents.recipe.decay_steps
        return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.05, remaining))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of both optimizers."""
        factor = self.learning_rate_factor(batch_idx)
        optimizers = self.optimizers()
        for optimizer, lr in zip(optimizers, (MUON_LR, ADAMW_LR), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.zero_grad()
        loss = self.model(**batch, use_cache=False).loss
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        self.log("pretrain/loss", loss.detach(), prog_bar=True)
