"""How much each neuron contributes to the target logits at the selected positions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_rejuv.attribution.hooks import requiring_grad
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.readers import ReaderAttribution
from lightning_rejuv.attribution.writers import WriterAttribution
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.config import RankBy
from lightning_rejuv.neurons import Decoder


@dataclass
class Attribution:
    """Contributions of every neuron to the target logits, over the positions seen so far.

    Attributes:
        total: for each neuron group [count] float64, the sum over positions of the contribution, logits.
        absolute: the same of its absolute value.
        union: for each group [count] bool, the neurons that are among the ``top`` of any position.
        top: how many neurons of each position join the union; 0 for none.
        positions: how many positions were seen.
        error: largest |reconstructed - actual| logit over the positions, divided by max(1, |actual|).
        ranking: how neurons are ranked by it where nothing else is said: ``"absolute"`` or ``"signed"``.
        reconstructs: whether the contributions add up to something, so that ``error`` says something.
    """

    total: list[Tensor] = field(default_factory=list)
    absolute: list[Tensor] = field(default_factory=list)
    union: list[Tensor] = field(default_factory=list)
    top: int = 0
    positions: int = 0
    error: float = 0.0
    ranking: RankBy = "absolute"
    reconstructs: bool = False

    def add(self, contributions: list[Tensor], error: Tensor) -> None:
        """Add contributions [P, count] of some positions, and their reconstruction errors [P]."""
        if not self.total:
            self.total = [torch.zeros_like(c[0], dtype=torch.float64) for c in contributions]
            self.absolute = [torch.zeros_like(c[0], dtype=torch.float64) for c in contributions]
            self.union = [torch.zeros_like(c[0], dtype=torch.bool) for c in contributions]
        if self.top:
            best = torch.cat(contributions, dim=1).abs().topk(self.top, dim=1).indices
            joined = torch.cat(self.union).index_fill(0, best.flatten().unique(), True)
            self.union = list(joined.split([len(mask) for mask in self.union]))
        for total, absolute, c in zip(self.total, self.absolute, contributions, strict=True):
            total += c.sum(0, dtype=torch.float64)
            absolute += c.abs().sum(0, dtype=torch.float64)
        self.positions += len(error)
        self.error = max(self.error, float(error.max()))


def attribute(
    model: nn.Module, decoder: Decoder, batches: list[Batch], positions: list[Positions], top: int = 0
) -> Attribution:
    """Attribute the logit of the target token to the neurons, at the selected positions.

    With the norms' scales frozen the logit is linear in what every layer writes into the residual stream:
    the writers' contributions are exact and add up to it, together with the embedding's and the biases'.
    For the readers it is gradient × activation. Liu et al. 2026, arXiv 2606.09932, §3.

    Args:
        model: the model in eval mode; its parameters receive no gradient.
        decoder: its parts.
        batches: calibration batches on the model's device.
        positions: for each batch the selected positions.
        top: how many neurons of each position join the union of the paper's rule.

    Returns:
        The contributions, and how well they reconstruct the logits.

    Raises:
        ValueError: a norm on the residual stream is neither an RMSNorm nor a LayerNorm.
    """
    result = Attribution(top=top, reconstructs=True)
    experts = {group.parameter for group in decoder.groups if group.expert is not None}
    frozen = [p for name, p in model.named_parameters() if name.removesuffix("_bias") in experts]
    with requiring_grad(frozen), torch.enable_grad():
        for batch, chosen in zip(batches, positions, strict=True):
            if not len(chosen):
                continue
            readers = ReaderAttribution(model, decoder, batch)
            writers = WriterAttribution(model, decoder, batch)
            for rank in chosen.rank.unique().tolist():
                row, time = chosen.row[chosen.rank == rank], chosen.time[chosen.rank == rank]
                read = iter(readers.contributions(row, time))
                written, reconstructed = writers.contributions(row, time)
                wrote = iter(written)
                actual = readers.logits(row, time)
                error = (reconstructed.detach() - actual).abs() / actual.abs().clamp(min=1)
                both = [next(wrote) if group.writes else next(read) for group in decoder.groups]
                result.add([c.detach() for c in both], error)
    return result
