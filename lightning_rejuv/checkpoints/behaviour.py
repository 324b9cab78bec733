"""What only running the models can tell: how sure they are of the demonstrations, which alpha, a few rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_rejuv.alpha import AlphaPoint, AlphaSearch, NoAlpha
from lightning_rejuv.attribution import confidence, format_probability, mean_entropy, mean_nll
from lightning_rejuv.calibration_checks import batches_for
from lightning_rejuv.checkpoints.checkpoint import Checkpoint
from lightning_rejuv.checkpoints.dialogues import Calibration
from lightning_rejuv.checkpoints.models import load_model
from lightning_rejuv.checkpoints.pairing import Pairing
from lightning_rejuv.checkpoints.reset import anchor_for, loadable
from lightning_rejuv.checkpoints.rollouts import Rollouts, TextJudge, TextVerifier, sample_rollouts
from lightning_rejuv.find_alpha import find_alpha, sample_base
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.progress import phase
from lightning_rejuv.sampling import sample_with_generate
from lightning_rejuv.weights.edit import Blend
from lightning_rejuv.weights.targets import open_targets


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
        search: the search for alpha; None where it came to none.
        rollouts: of the SFT model, judged by the verifier; None without one.
        no_alpha: why the search came to no alpha, in sentences; None where it came to one.
    """

    responses: int
    entropy_sft: float
    entropy_base: float
    nll_sft: float
    format_probability: float
    support_retention: float
    search: AlphaSearch | None
    rollouts: Rollouts | None = None
    no_alpha: str | None = None

    @property
    def entropy_ratio(self) -> float:
        """Entropy of the SFT model relative to the base's, on the same tokens."""
        return self.entropy_sft / self.entropy_base if self.entropy_base else float("nan")

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against the alpha that was found, or that none was, and against the rollouts, in sentences."""
        search = self.search.doubts if self.search else ()
        none = () if self.no_alpha is None else (self.no_alpha,)
        return (*search, *none, *(self.rollouts.doubts if self.rollouts else ()))

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
    calibration: Calibration,
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
        calibration: see :func:`~lightning_rejuv.checkpoints.reset.calibration_for`.
        verifier: from prompt and response to whether it is right; with it the SFT model answers as well, see
            :func:`~lightning_rejuv.checkpoints.rollouts.sample_rollouts`, and so does the fusion that the search found.
        device: where to run.
        dtype: in which dtype.
        scratch: an empty directory, see :func:`plan_on_disk`.
        seed: of the sampling.
    """
    model = load_model(loadable(sft, scratch), device, dtype)
    batches = batches_for(model, calibration.batches)
    judge = TextJudge(verifier, calibration.prompts, calibration.tokenizer) if verifier is not None else None
    targets = open_targets(model, anchor_for(model, sft, base, pairing, dtype, scratch))
    sampler = sample_with_generate(batches, seed)
    with evaluation_mode(model), Blend(targets.fused, targets.base_of) as blend:
        with phase("comparing with the base", 2 * len(batches)):
            blend.at(0.0)
            known = [confidence(model, batch) for batch in batches]
            blend.at(1.0)
            own = [confidence(model, batch) for batch in batches]
        rollouts = sample_rollouts(model, batches, judge, seed) if judge else None
        sampled = sample_base(model, blend, sample_with_generate(batches, seed, targets.base_ends))
        search, no_alpha = None, None
        try:
            search = find_alpha(model, blend, batches, sampled, sampler=sampler, judge=judge)
            curve = search.curve
        except NoAlpha as error:  # all else that was measured is an answer, too
            curve, no_alpha = error.curve, _why(error.curve)
    responses = sum(len(batch.response) for batch in batches)
    return Behaviour(
        responses=responses,
        entropy_sft=mean_entropy(own),
        entropy_base=mean_entropy(known),
        nll_sft=mean_nll(own),
        format_probability=format_probability(batches, own, known),
        support_retention=curve[0].base_samples - curve[-1].base_samples,
        search=search,
        rollouts=rollouts,
        no_alpha=no_alpha,
    )


def _why(curve: Sequence[AlphaPoint]) -> str:
    """Say what of a curve leads to no alpha, to whoever brought `base`, `sft` and `calibration`."""
    if not all(
        math.isfinite(value) for point in curve for value in (point.demonstrations, point.base_samples)
    ):
        return (
            "The search comes to no alpha: likelihoods on the line between base and SFT model are not finite. Has "
            "the SFT model diverged, or do its logits overflow? Run them in float32 or bfloat16."
        )
    base, sft = curve[0].demonstrations, curve[-1].demonstrations
    return (
        "The search comes to no alpha: on the whole line between base and SFT model the calibration demonstrations are "
        f"likeliest under the base ({base:.2f} nats a response, {sft:.2f} under the SFT model). An over-confident SFT "
        "model does that to demonstrations that it has not seen; otherwise base and SFT model are swapped, or the "
        "demonstrations are not of the kind that SFT trained on."
    )
