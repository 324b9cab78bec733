"""Everything that is learned from the calibration set before a weight changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_rejuv.attribution.confidence import Confidence, confidence, mean_entropy
from lightning_rejuv.attribution.positions import PositionRule, Positions, select_positions
from lightning_rejuv.attribution.scores import Attribution, attribute
from lightning_rejuv.calibration import Batch
from lightning_rejuv.edit import Blend
from lightning_rejuv.neurons import Decoder


@dataclass(frozen=True)
class Calibrated:
    """What the calibration set says about an SFT model and its anchor.

    Attributes:
        attribution: the neurons' contributions at the selected positions.
        sharpened: how many selected positions are sharpened.
        learned: how many are learned.
        entropy_base: mean token entropy of the anchor on the responses, nats.
        entropy_sft: mean token entropy of the SFT model, nats.
    """

    attribution: Attribution
    sharpened: int
    learned: int
    entropy_base: float
    entropy_sft: float


def calibrate(
    model: nn.Module, decoder: Decoder, blend: Blend, batches: list[Batch], rule: PositionRule, count: int
) -> Calibrated:
    """Compare the SFT model with its anchor on the calibration set and attribute the difference.

    Args:
        model: the SFT model in eval mode.
        decoder: its parts.
        blend: entered for ``model``; used to put the anchor's weights into it for one pass.
        batches: the calibration set, on the model's device.
        rule: at which positions neurons are attributed.
        count: the most positions per response.

    Raises:
        ValueError: the rule selects no position.
    """
    blend.at(0.0)
    base = [confidence(model, batch) for batch in batches]
    blend.at(1.0)
    sft = [confidence(model, batch) for batch in batches]
    positions = [
        select_positions(s, b, batch.response, rule, count)
        for s, b, batch in zip(sft, base, batches, strict=True)
    ]
    _check_any(positions, rule, base, sft)
    return Calibrated(
        attribute(model, decoder, batches, positions),
        sum(p.sharpened for p in positions),
        sum(p.learned for p in positions),
        mean_entropy(base),
        mean_entropy(sft),
    )


def _check_any(positions: list[Positions], rule: str, base: list[Confidence], sft: list[Confidence]) -> None:
    if any(len(p) for p in positions):
        return
    raise ValueError(
        f"Expected at least one position for `positions={rule!r}` but the calibration set has none: the mean "
        f"token entropy is {mean_entropy(base):.3f} nats in the anchor and {mean_entropy(sft):.3f} in the "
        "model, and nowhere did SFT sharpen what the anchor already gave p >= 0.25. Check that `model` and "
        "`anchor` are not swapped, bring calibration data in the style of the SFT set, or set "
        "`reset_fraction=0`."
    )
