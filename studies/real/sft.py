"""Supervised training on demonstrations, with a checkpoint after some of the epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from studies.real.logits import response_logits
from studies.real.master import MasterWeights
from studies.real.recipes import Texts
from studies.real.texts import Pair


class SupervisedFineTuning(MasterWeights):
    """Mean cross-entropy over the tokens of the responses of a batch.

    Args:
        model: What to start from.
        pairs: The demonstrations.
        texts: Rate, batch size and epochs.
        dtype: What is computed in.
        seed: Of their order.
        after_epoch: Called with the number of epochs done, after those that `texts` names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: Sequence[Pair],
        texts: Texts,
        dtype: torch.dtype,
        seed: int,
        after_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        super().__init__(model, texts.learning_rate, dtype)
        self.pairs, self.texts, self.seed, self.after_epoch = list(pairs), texts, seed, after_epoch

    def train_dataloader(self) -> DataLoader[list[Pair]]:
        """All demonstrations, in another order every epoch."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.pairs,  # type: ignore[arg-type]
            self.texts.batch_size,
            shuffle=True,
            generator=order,
            collate_fn=list,
        )

    def training_step(self, batch: list[Pair], batch_idx: int) -> Tensor:
        """Take one step."""
        logits, tokens = response_logits(self.model, batch)
        loss = cross_entropy(logits, tokens)
        self.manual_backward(loss)
        self.log("loss", loss.detach(), batch_size=len(batch))
        self.update()
        return loss.detach()

    def on_train_epoch_end(self) -> None:
        """Hand the rungs of the ladder over."""
        done = self.current_epoch + 1
        if done in self.texts.epochs:
            self.after_epoch(done)
