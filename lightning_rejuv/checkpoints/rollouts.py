"""A few rollouts of a model, judged by a verifier: whether RL would find something to reward, and alternatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.calibration import IGNORED, Batch
from lightning_rejuv.checkpoints.dialogues import Prompt, prompt_tokens
from lightning_rejuv.find_alpha import count_unfinished
from lightning_rejuv.functional.rollouts import pass_at_k, zero_variance_fraction
from lightning_rejuv.progress import advance, phase
from lightning_rejuv.sampling import sample_with_generate
from lightning_rejuv.verifier import ask, is_right

#: Groups as GRPO has them. In 16 groups of 8 an error of pass@1 of about .04, and none right below a pass@1 of .02.
PROMPTS, GROUP = 16, 8
#: Other prompts that each response is held against, to see how often a guess is right.
OTHERS = 3
#: Above such a share of rollouts that came to no end, what was judged are beginnings.
_UNFINISHED = 0.5
_SHOWN = 200

TextVerifier = Callable[[str, str], Any]


@dataclass(frozen=True)
class Rollouts:
    """What rollouts came to.

    Attributes:
        prompts: how many prompts.
        group: how many rollouts to each.
        pass_at_1: share that is right.
        pass_at_8: share of the prompts with a right one among 8.
        zero_variance_fraction: share of the groups that are all right or all wrong.
        chance_pass_at_1: share that would be right if it were the answer to another of the prompts; None where there
            is no other.
        unfinished: how many came to no end-of-sequence token: all of them where the model names none.
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
class TextJudge:
    """Has a verifier say which sampled responses are right; a :data:`~lightning_rejuv.find_alpha.Judge`.

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
        """Go through the rows of a sampled batch: the prompt's tokens, and the response as text."""
        for ids, labels in zip(sample["input_ids"], sample["labels"], strict=True):
            response = self.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
            yield prompt_tokens(ids, labels), response

    def __call__(self, sample: Mapping[str, Tensor], where: str) -> list[bool]:
        """Ask about each response of a sampled batch."""
        return [self.right(self.prompts[prompt], response) for prompt, response in self.responses(sample)]


def sample_rollouts(model: nn.Module, batches: Sequence[Batch], judge: TextJudge, seed: int = 0) -> Rollouts:
    """Sample groups of responses to some calibration prompts, and have a verifier judge them.

    Of the different prompts of the calibration data at most 16 are taken, evenly over it: 128 responses, sampled
    at temperature 1 as :func:`~lightning_rejuv.sampling.sample_with_generate` does. The verifier is called four times
    for each: with its own prompt, and with three of the others.

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
        """[prompts, group] int64: responses that are right answers to the prompt so many places on."""
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
            start = int(response.int().argmax()) + 1  # where the first response token stands
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
