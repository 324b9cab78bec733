"""How much each neuron contributes to the target logits at the selected positions (Liu et al. 2026)."""

from __future__ import annotations

import torch
from torch import nn

from lightning_rejuv.attribution.attribution import Attribution
from lightning_rejuv.attribution.positions import Positions
from lightning_rejuv.attribution.target_logit.readers import ReaderAttribution
from lightning_rejuv.attribution.target_logit.writers import WriterAttribution
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.forward import requiring_grad
from lightning_rejuv.neurons import Decoder

# The largest reconstruction error, relative to the logit, at which the contributions still mean something.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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


def check_reconstruction(attribution: Attribution, dtype: torch.dtype) -> None:
    """Refuse contributions that do not add up to the logits they should explain.

    Args:
        attribution: the contributions and their reconstruction error.
        dtype: the model's dtype; under autocast, the dtype of autocast counts instead.

    Raises:
        ValueError: the error is above what the dtype's rounding explains.
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    if not attribution.error <= _TOLERANCE.get(dtype, 1e-1):
        raise ValueError(
            f"Expected the neurons' contributions to add up to the target logits but the reconstruction error is "
            f"{attribution.error:.1e} (at most {_TOLERANCE.get(dtype, 1e-1):.0e} for {dtype}): the scores would "
            "mean nothing. Was a module of the model replaced or patched? Pass `reset=None` for fusion alone."
        )
