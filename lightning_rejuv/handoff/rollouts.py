"""A few rollouts of a model, judged by a verifier: whether RL would find something to reward, and alternatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.calibration import IGNORED, Batch
from lightning_rejuv.find_alpha import Verifier
from lightning_rejuv.functional.pass_at_k import pass_at_k
from lightning_rejuv.functional.zero_variance_fraction import zero_variance_fraction
from lightning_rejuv.sampling import sample_with_generate

#: Groups as GRPO has them. In 16 groups of 8 an error of pass@1 of about .04, and none right below a pass@1 of .02.
PROMPTS, GROUP = 16, 8
#: Other prompts that each response is held against, to see how often a guess is right.
OTHERS = 3

TextVerifier = Callable[[str, str], Any]
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Rollouts:
    """What rollouts came to.

    Attributes:
        prompts: how many prompts.
        group: how many rollouts to each.
        pass_at_1: share that is right.
        pass_at_8: share of the prompts with a right one among 8.
        zero_variance_fraction: share of the groups that are all right or all wrong.
        chance_pass_at_1: share that would be right if it were the answer to another of the prompts.
    """

    prompts: int
    group: int
    pass_at_1: float
    pass_at_8: float
    zero_variance_fraction: float
    chance_pass_at_1: float = 0.0

    @property
    def measures(self) -> dict[str, float]:
        """The figures that :func:`lightning_rejuv.verdict.judge` takes."""
        names = ("pass_at_1", "pass_at_8", "zero_variance_fraction", "chance_pass_at_1")
        return {name: getattr(self, name) for name in names}


def sample_rollouts(
    model: nn.Module, batches: Sequence[Batch], verifier: TextVerifier, tokenizer: Any, seed: int = 0
) -> Rollouts:
    """Sample groups of responses to some calibration prompts, and have a verifier judge them.

    Of the different prompts of the calibration data at most 16 are taken, evenly over it: 128 responses, sampled
    at temperature 1 as :func:`~lightning_rejuv.sampling.sample_with_generate` does. The verifier is called four times
    for each: with its own prompt, and with three of the others.

    Args:
        model: in eval mode.
        batches: calibration batches.
        verifier: from prompt and response to whether it is right.
        tokenizer: decodes them; special tokens are left out of responses.
        seed: of the sampling.
    """
    groups: dict[Prompt, list[str]] = {}
    for sample in sample_with_generate(_groups(batches), seed)(model):
        for prompt, response in _answers(sample, tokenizer):
            groups.setdefault(prompt, []).append(response)
    prompts = [tokenizer.decode(torch.tensor(prompt)) for prompt in groups]
    responses = list(groups.values())

    def right(shift: int) -> Tensor:
        """[prompts, group] int64: responses that are right answers to the prompt so many places on."""
        return torch.tensor(
            [
                [bool(verifier(prompts[(number + shift) % len(prompts)], one)) for one in group]
                for number, group in enumerate(responses)
            ],
            dtype=torch.int64,
        )

    found = right(0)
    others = [right(shift) for shift in range(1, min(OTHERS, len(prompts) - 1) + 1)]

    def mean_pass(k: int) -> float:
        return float(pass_at_k(GROUP, found.sum(1), k).mean())

    return Rollouts(
        prompts=len(prompts),
        group=GROUP,
        pass_at_1=mean_pass(1),
        pass_at_8=mean_pass(GROUP),
        zero_variance_fraction=float(zero_variance_fraction(found)),
        chance_pass_at_1=float(torch.stack(others).double().mean()) if others else 0.0,
    )


def text_verifier(verifier: TextVerifier, tokenizer: Any) -> Verifier:
    """Make a verifier of prompt and response one of a sampled batch: from it to [B] bool."""

    def check(batch: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor(
            [
                bool(verifier(tokenizer.decode(torch.tensor(prompt)), response))
                for prompt, response in _answers(batch, tokenizer)
            ]
        )

    return check


def _answers(sample: Mapping[str, Tensor], tokenizer: Any) -> Iterator[tuple[Prompt, str]]:
    """Go through the rows of a sampled batch: the prompt's ids, and the response as text."""
    for ids, labels in zip(sample["input_ids"], sample["labels"], strict=True):
        response = labels != IGNORED
        prompt = tuple(ids[: int(response.int().argmax())].tolist())
        yield prompt, tokenizer.decode(labels[response], skip_special_tokens=True)


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
