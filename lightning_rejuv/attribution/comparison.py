"""Entropies of model and base on the calibration set, and the positions that they select."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_rejuv.attribution.confidence import Confidence, confidence, mean_entropy
from lightning_rejuv.attribution.positions import Positions, select_positions
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.config import PositionRule
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.progress import phase
from lightning_rejuv.weights.blend import Blend


@dataclass(frozen=True)
class Comparison:
    """What the calibration set says about an SFT model beside its anchor.

    Attributes:
        positions: for each batch the selected positions; empty without a reset.
        entropy_base: mean token entropy of the anchor on the responses, nats.
        entropy_sft: mean token entropy of the SFT model, nats.
    """

    positions: list[Positions]
    entropy_base: float
    entropy_sft: float


def compare(
    model: nn.Module,
    blend: Blend,
    batches: list[Batch],
    rule: PositionRule,
    count: int,
    reference: nn.Module | None = None,
    ends: Mapping[float, list[Confidence]] | None = None,
) -> Comparison:
    """Compare the SFT model with its anchor on the calibration set and select positions.

    Args:
        model: the SFT model in eval mode.
        blend: the blend of ``model``, entered; it puts the anchor's weights into the model for one pass.
        batches: the calibration set, on the model's device.
        rule: at which positions neurons are attributed.
        count: the most positions per response.
        reference: the anchor as a module on the same device, if there is one. It is run as it is, which saves a copy
            of the model's weights.
        ends: how sure ``model`` is on the batches with the anchor's weights in it (0.0) and with its own (1.0), if that
            is known; the reference is run all the same.

    Raises:
        ValueError: the rule selects no position.
    """
    known = {alpha: found for alpha, found in (ends or {}).items() if alpha == 1.0 or reference is None}
    with phase("comparing with the base", (2 - len(known)) * len(batches)):
        if reference is not None:
            with evaluation_mode(reference):
                base = [confidence(reference, batch) for batch in batches]
        elif 0.0 in known:
            base = known[0.0]
        else:
            blend.at(0.0)
            base = [confidence(model, batch) for batch in batches]
        blend.at(1.0)
        sft = known.get(1.0) or [confidence(model, batch) for batch in batches]
    positions = [
        select_positions(s, b, batch.response, rule, count)
        for s, b, batch in zip(sft, base, batches, strict=True)
    ]
    _check_any(positions, rule, base, sft)
    return Comparison(positions, mean_entropy(base), mean_entropy(sft))


def _check_any(positions: list[Positions], rule: str, base: list[Confidence], sft: list[Confidence]) -> None:
    if any(len(p) for p in positions):
        return
    raise ValueError(
        f"Expected at least one position for `positions={rule!r}` but the calibration set has none: the mean token "
        f"entropy is {mean_entropy(base):.3f} nats in the anchor and {mean_entropy(sft):.3f} in the model, and "
        "nowhere did SFT sharpen what the anchor already gave p >= 0.25. Check that `model` and `anchor` are not "
        "swapped, bring calibration data in the style of the SFT set, or pass `reset=None`."
    )
