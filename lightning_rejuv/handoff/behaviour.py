"""What only running the models can tell: how sure they are of the demonstrations, which alpha, a few rollouts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_rejuv.access.edit import Blend
from lightning_rejuv.access.targets import open_targets
from lightning_rejuv.alpha import AlphaSearch
from lightning_rejuv.attribution import confidence, format_probability, mean_entropy, nll_per_response
from lightning_rejuv.calibration_checks import batches_for
from lightning_rejuv.find_alpha import find_alpha
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.handoff.checkpoint import Checkpoint
from lightning_rejuv.handoff.models import load_model, load_tokenizer
from lightning_rejuv.handoff.pairing import Pairing
from lightning_rejuv.handoff.reset import anchor_for, loadable
from lightning_rejuv.handoff.rollouts import Rollouts, TextVerifier, sample_rollouts
from lightning_rejuv.sampling import sample_with_generate


@dataclass(frozen=True)
class Behaviour:
    """What the calibration data said.

    Attributes:
        responses: how many demonstrations there are.
        entropy_sft: mean token entropy of the SFT model on them, nats, teacher-forced.
        entropy_base: the base's on the same tokens.
        nll_sft: mean negative log-likelihood that the SFT model gives their tokens, nats.
        format_probability: of the format that they share and the base did not know, under the SFT model.
        support_retention: mean of ln p_sft(y) - ln p_base(y) over responses y that the base sampled to the
            calibration prompts, nats per response. It is shown and not judged: what SFT has rightly taught lowers it.
        search: the search for alpha.
        rollouts: of the SFT model, judged by the verifier; None without one.
    """

    responses: int
    entropy_sft: float
    entropy_base: float
    nll_sft: float
    format_probability: float
    support_retention: float
    search: AlphaSearch
    rollouts: Rollouts | None = None

    @property
    def entropy_ratio(self) -> float:
        """Entropy of the SFT model relative to the base's, on the same tokens."""
        return self.entropy_sft / self.entropy_base if self.entropy_base else float("nan")

    @property
    def measures(self) -> dict[str, float]:
        """What :func:`lightning_rejuv.verdict.judge` takes of the SFT model."""
        return {
            "token_entropy": self.entropy_sft,
            "token_nll": self.nll_sft,
            "format_probability": self.format_probability,
            **(self.rollouts.measures if self.rollouts else {}),
        }


def measure_behaviour(
    sft: Checkpoint,
    base: Checkpoint,
    pairing: Pairing,
    calibration: Sequence[Mapping[str, Tensor]],
    verifier: TextVerifier | None,
    device: str,
    dtype: torch.dtype,
    scratch: Path,
    seed: int = 0,
) -> Behaviour:
    """Run the SFT model, and the base in its place, on the calibration data and on what they sample.

    Args:
        sft: the SFT model.
        base: the base.
        pairing: which of their tensors belong together.
        calibration: batches, see :func:`calibration_batches`.
        verifier: from prompt and response to whether it is right; with it the SFT model answers as well, see
            :func:`~lightning_rejuv.handoff.rollouts.sample_rollouts`.
        device: where to run.
        dtype: in which dtype.
        scratch: an empty directory, see :func:`plan_on_disk`.
        seed: of the sampling.
    """
    model = load_model(loadable(sft, scratch), device, dtype)
    tokenizer = load_tokenizer(sft.path)
    batches = batches_for(model, calibration)
    targets = open_targets(model, anchor_for(model, sft, base, pairing, dtype, scratch))
    with evaluation_mode(model), Blend(targets.fused, targets.base_of) as blend:
        blend.at(0.0)
        known = [confidence(model, batch) for batch in batches]
        blend.at(1.0)
        own = [confidence(model, batch) for batch in batches]
        rollouts = sample_rollouts(model, batches, verifier, tokenizer, seed) if verifier else None
        search = find_alpha(model, blend, "auto", sample_with_generate(batches, seed))
    responses = sum(len(batch.response) for batch in batches)
    tokens = sum(int(batch.response.sum()) for batch in batches)
    return Behaviour(
        responses=responses,
        entropy_sft=mean_entropy(own),
        entropy_base=mean_entropy(known),
        nll_sft=nll_per_response(own) * responses / tokens,
        format_probability=format_probability(batches, own, known),
        support_retention=-dict(search.curve)[1.0],
        search=search,
        rollouts=rollouts,
    )


def import_verifier(name: str) -> TextVerifier:
    """Import ``module:function``.

    Raises:
        ValueError: it does not exist, or cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected `verifier` as MODULE:FUNCTION that can be imported but got {name!r}: {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"Expected `verifier` {name!r} to be a function but got {type(found).__name__}.")
    return found  # type: ignore[no-any-return]
