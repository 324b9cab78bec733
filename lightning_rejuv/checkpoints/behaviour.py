"""Figures that need the models run: how sure they are of the demonstrations, which alpha fits, a few rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.alpha.line import count_unfinished, find_alpha, sample_base
from lightning_rejuv.alpha.sampling import sample_with_generate
from lightning_rejuv.alpha.search import AlphaPoint, AlphaSearch, NoAlpha
from lightning_rejuv.attribution import confidence, format_probability, mean_entropy, mean_nll
from lightning_rejuv.calibration.batches import IGNORED, Batch
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.checkpoints.dialogues import Calibration, Prompt, prompt_tokens
from lightning_rejuv.checkpoints.models import load_model
from lightning_rejuv.checkpoints.pairing import Pairing
from lightning_rejuv.checkpoints.plan_on_disk import anchor_for, loadable
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.functional.rollouts import pass_at_k, zero_variance_fraction
from lightning_rejuv.progress import advance, phase
from lightning_rejuv.verifier import ask, is_right
from lightning_rejuv.weights.blend import Blend
from lightning_rejuv.weights.open_targets import open_targets

#: Groups as GRPO has them. In 16 groups of 8 an error of pass@1 of about .04, and none right below a pass@1 of .02.
PROMPTS, GROUP = 16, 8
#: Other prompts that each response is held against, to see how often a guess is right.
OTHERS = 3
#: Above such a share of rollouts that came to no end, what was judged are beginnings.
_UNFINISHED = 0.5
_SHOWN = 200

# Says of the texts of prompt and response whether the response is right.
TextVerifier = Callable[[str, str], Any]


@dataclass(frozen=True)
class Rollouts:
    """Figures of a few rollouts that a verifier judged.

    Attributes:
        prompts: how many prompts.
        group: how many rollouts to each.
        pass_at_1: share that is right.
        pass_at_8: share of the prompts with a right one among 8.
        zero_variance_fraction: share of the groups that are all right or all wrong.
        chance_pass_at_1: share that would be right if it were the answer to another of the prompts; None if
            there is no other.
        unfinished: how many came to no end-of-sequence token: all of them if the model names none.
    """

    prompts: int
    group: int
    pass_at_1: float
    pass_at_8: float
    zero_variance_fraction: float
    chance_pass_at_1: float | None = None
    unfinished: int = 0

    @property
    def measures(self) -> dict[str, float]:
        """The figures that :func:`lightning_rejuv.verdict.judge` takes."""
        names = ("pass_at_1", "pass_at_8", "zero_variance_fraction", "chance_pass_at_1")
        measured = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**measured, "rollout_groups": float(self.prompts)}

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against the figures, in sentences; empty if nothing does.

        >>> Rollouts(16, 8, 0.0, 0.0, 1.0, unfinished=64).doubts
        ()
        >>> print(*Rollouts(16, 8, 0.0, 0.0, 1.0, unfinished=65).doubts)
        65 of the 128 rollouts did not end: their beginnings were judged. Does `eos_token_id` in ...?
        """
        count = self.prompts * self.group
        if self.unfinished <= _UNFINISHED * count:
            return ()
        return (
            f"{self.unfinished} of the {count} rollouts did not end: their beginnings were judged. Does `eos_token_id` "
            "in generation_config.json name the token that ends the demonstrations?",
        )


@dataclass(frozen=True)
class Behaviour:
    """Figures of the SFT model on the calibration data, beside the base's.

    Attributes:
        responses: how many demonstrations there are.
        entropy_sft: mean token entropy of the SFT model on them, nats, teacher-forced.
        entropy_base: the base's on the same tokens.
        nll_sft: mean negative log-likelihood that the SFT model gives their tokens, nats.
        format_probability: of the format that they share and the base did not know, under the SFT model.
        support_retention: mean of ln p_sft(y) - ln p_base(y) over responses y that the base sampled to the
            calibration prompts, nats per response. It is shown and not judged: what SFT has rightly taught lowers it.
        search: the search for alpha; None if it came to none.
        rollouts: of the SFT model, judged by the verifier; None without one.
        no_alpha: why the search came to no alpha, in sentences; None if it came to one.
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
        """The figures of the SFT model that :func:`lightning_rejuv.verdict.judge` takes."""
        return {
            "token_entropy": self.entropy_sft,
            "token_nll": self.nll_sft,
            "format_probability": self.format_probability,
            **(self.rollouts.measures if self.rollouts else {}),
        }


def measure_behaviour(
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
        pairing: the SFT model and its base.
        calibration: see :func:`~lightning_rejuv.checkpoints.plan_on_disk.calibration_for`.
        verifier: from prompt and response to whether it is right; with it the SFT model answers as well, see
            :func:`sample_rollouts`, and so does the fusion that the search found.
        device: the device to run on.
        dtype: the dtype to run in.
        scratch: an empty directory, see :func:`~lightning_rejuv.checkpoints.plan_on_disk.plan_on_disk`.
        seed: of the sampling.
    """
    model = load_model(loadable(pairing.sft, scratch), device, dtype)
    batches = batches_for(model, calibration.batches)
    judge = TextJudge(verifier, calibration.prompts, calibration.tokenizer) if verifier is not None else None
    targets = open_targets(model, anchor_for(model, pairing, dtype, scratch))
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
            ends = {0.0: known, 1.0: own}
            search = find_alpha(model, blend, batches, sampled, sampler=sampler, judge=judge, ends=ends)
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
    """Explain to the user what of a curve leads to no alpha."""
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


@dataclass(frozen=True)
class TextJudge:
    """Has a verifier say which sampled responses are right; a :data:`~lightning_rejuv.alpha.line.Judge`.

    Attributes:
        verifier: from the texts of prompt and response to whether it is right.
        prompts: the text of each prompt by its tokens.
        tokenizer: decodes responses; special tokens are left out.
    """

    verifier: TextVerifier
    prompts: Mapping[Prompt, str]
    tokenizer: Any

    def right(self, prompt: str, response: str) -> bool:
        """Ask about one response.

        Raises:
            ValueError: the answer is none, see :func:`lightning_rejuv.verifier.is_right`.
            RuntimeError: the verifier failed.
        """
        about = f"prompt {prompt!r:.{_SHOWN}} and response {response!r:.{_SHOWN}}"
        return is_right(ask(self.verifier, prompt, response, about=about), about)

    def responses(self, sample: Mapping[str, Tensor]) -> Iterator[tuple[Prompt, str]]:
        """Yield for each row of a sampled batch the prompt's tokens and the response as text."""
        for ids, labels in zip(sample["input_ids"], sample["labels"], strict=True):
            response = self.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
            yield prompt_tokens(ids, labels), response

    def __call__(self, sample: Mapping[str, Tensor], where: str) -> list[bool]:
        """Ask about each response of a sampled batch."""
        return [self.right(self.prompts[prompt], response) for prompt, response in self.responses(sample)]


def sample_rollouts(model: nn.Module, batches: Sequence[Batch], judge: TextJudge, seed: int = 0) -> Rollouts:
    """Sample groups of responses to some calibration prompts, and have a verifier judge them.

    Of the different prompts of the calibration data at most 16 are taken, evenly over it: 128 responses, sampled
    at temperature 1 as :func:`~lightning_rejuv.alpha.sampling.sample_with_generate` does. The verifier is called four
    times for each: with its own prompt, and with three of the others.

    Args:
        model: in eval mode.
        batches: calibration batches.
        judge: says of a prompt and a response whether it is right.
        seed: of the sampling.

    Raises:
        ValueError: the verifier's answer is none.
        RuntimeError: the verifier failed.
    """
    samples = list(sample_with_generate(_groups(batches), seed)(model))
    groups: dict[Prompt, list[str]] = {}
    for sample in samples:
        for prompt, response in judge.responses(sample):
            groups.setdefault(prompt, []).append(response)
    prompts = [judge.prompts[prompt] for prompt in groups]
    responses = list(groups.values())
    shifts = range(1, min(OTHERS, len(prompts) - 1) + 1)

    def told(prompt: str, response: str) -> bool:
        right = judge.right(prompt, response)
        advance()
        return right

    def right(shift: int) -> Tensor:
        """Return [prompts, group] int64: 1 for a response that answers the prompt so many places on rightly."""
        return torch.tensor(
            [
                [told(prompts[(number + shift) % len(prompts)], response) for response in group]
                for number, group in enumerate(responses)
            ],
            dtype=torch.int64,
        )

    with phase("checking responses", (1 + len(shifts)) * len(prompts) * GROUP):
        found = right(0)
        others = [right(shift) for shift in shifts]

    def mean_pass(k: int) -> float:
        return float(pass_at_k(GROUP, found.sum(1), k).mean())

    return Rollouts(
        prompts=len(prompts),
        group=GROUP,
        pass_at_1=mean_pass(1),
        pass_at_8=mean_pass(GROUP),
        zero_variance_fraction=float(zero_variance_fraction(found)),
        chance_pass_at_1=float(torch.stack(others).double().mean()) if others else None,
        unfinished=count_unfinished(samples) or 0,  # `generate` of transformers never ends before its time
    )


def _groups(batches: Sequence[Batch]) -> list[Batch]:
    """Return one batch for each chosen prompt, its row repeated."""
    rows: dict[Prompt, Batch] = {}
    for batch in batches:
        for row, response in enumerate(batch.response):
            start = int(response.int().argmax()) + 1  # the place of the first response token
            prompt = tuple(batch.inputs["input_ids"][row, :start].tolist())
            rows.setdefault(prompt, _repeated(batch, row))
    different = list(rows.values())
    count = min(PROMPTS, len(different))
    return [different[number * len(different) // count] for number in range(count)]


def _repeated(batch: Batch, row: int) -> Batch:
    def repeated(tensor: Tensor) -> Tensor:
        return tensor[row : row + 1].expand(GROUP, *tensor.shape[1:])

    return replace(
        batch,
        inputs={name: repeated(tensor) for name, tensor in batch.inputs.items()},
        targets=repeated(batch.targets),
        response=repeated(batch.response),
        rows=(row,) * GROUP,
    )
