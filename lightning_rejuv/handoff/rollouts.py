"""A few rollouts of a model, judged by a verifier: whether RL would find something to reward, and alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_rejuv.calibration import IGNORED, Batch
from lightning_rejuv.find_alpha import Verifier
from lightning_rejuv.functional.pass_at_k import pass_at_k
from lightning_rejuv.functional.zero_variance_fraction import zero_variance_fraction
from lightning_rejuv.sampling import sample_with_generate

#: Groups as GRPO has them. In 16 groups of 8 an error of pass@1 of about .04, and none right below a pass@1 of .02.
PROMPTS, GROUP = 16, 8


@dataclass(frozen=True)
class Rollouts:
    """What rollouts came to.

    Attributes:
        prompts: how many prompts.
        group: how many rollouts to each.
        pass_at_1: share that is right.
        pass_at_8: share of the prompts with a right one among 8.
        zero_variance_fraction: share of the groups that are all right or all wrong.
    """

    prompts: int
    group: int
    pass_at_1: float
    pass_at_8: float
    zero_variance_fraction: float

    @property
    def measures(self) -> dict[str, float]:
        """The figures that :func:`lightning_rejuv.verdict.judge` takes."""
        names = ("pass_at_1", "pass_at_8", "zero_variance_fraction")
        return {name: getattr(self, name) for name in names}


def sample_rollouts(
    model: nn.Module, batches: Sequence[Batch], verifier: Verifier, seed: int = 0
) -> Rollouts:
    """Sample groups of responses to some calibration prompts, and have a verifier judge them.

    Of the different prompts of the calibration data at most 16 are taken, evenly over it: 128 responses, sampled
    at temperature 1 as :func:`~lightning_rejuv.sampling.sample_with_generate` does.

    Args:
        model: in eval mode.
        batches: calibration batches.
        verifier: from a sampled batch to [B] bool, which responses are right.
        seed: of the sampling.
    """
    chosen = _groups(batches)
    rewards: dict[tuple[int, ...], list[bool]] = {}
    for sample in sample_with_generate(chosen, seed)(model):
        right = verifier(sample).tolist()
        for ids, labels, one in zip(sample["input_ids"], sample["labels"], right, strict=True):
            rewards.setdefault(_prompt(ids, labels != IGNORED), []).append(bool(one))
    found = torch.tensor(list(rewards.values()), dtype=torch.int64)
    prompts, group = found.shape

    def mean_pass(k: int) -> float:
        return float(pass_at_k(group, found.sum(1), k).mean())

    return Rollouts(prompts, group, mean_pass(1), mean_pass(GROUP), float(zero_variance_fraction(found)))


def _prompt(ids: Tensor, response: Tensor) -> tuple[int, ...]:
    return tuple(ids[: int(response.int().argmax())].tolist())


def _groups(batches: Sequence[Batch]) -> list[Batch]:
    """Return one batch for each chosen prompt, its row repeated."""
    rows: dict[tuple[int, ...], Batch] = {}
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
