"""What is measured on a start before its RL: the monitor's measures, and support on the base's own samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.sft_to_rl.grpo import response_log_probs
from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.sampling import Rollouts, sample
from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.sft import held_out_demonstrations
from examples.sft_to_rl.tasks import Task
from examples.sft_to_rl.tasks.documents import Batch
from lightning_rejuv import PlasticityMonitor
from lightning_rejuv.functional import support_retention


@dataclass
class Support:
    """Responses that the base sampled to held-out prompts, and how likely it finds them.

    Args:
        rollouts: The responses, on the CPU.
        base_log_probs: The base's log-probabilities of their tokens, ``[B, T]`` in nats.
    """

    rollouts: Rollouts
    base_log_probs: Tensor

    @property
    def solved(self) -> Tensor:
        """Which responses solve the task, whatever became of the closing form, ``[B]`` bool.

        The base completes the form in about one response of a thousand: asked for it as well, the verifier
        would accept nothing.
        """
        return self.rollouts.solved > 0

    def of(self, model: LlamaForCausalLM, rows: Tensor | None = None) -> float | None:
        """Mean log-likelihood of the responses in excess of the base's, nats per response; None without any."""
        rows = torch.ones(len(self.solved), dtype=torch.bool) if rows is None else rows
        if not bool(rows.any()):
            return None
        log_probs = teacher_forced(model, self.rollouts)
        mask = self.rollouts.agent_mask
        return float(support_retention(log_probs[rows], self.base_log_probs[rows], mask[rows]))

    def summary(self) -> dict[str, float]:
        """How many responses there are, how many of them solve the task, and their mean length in tokens."""
        mask = self.rollouts.agent_mask
        return {
            "responses": len(mask),
            "solved": int(self.solved.sum()),
            "tokens_per_response": round(float(mask.sum() / len(mask)), 3),
        }


@torch.no_grad()
def teacher_forced(model: LlamaForCausalLM, rollouts: Rollouts) -> Tensor:
    """Log-probabilities that `model` gives the tokens of `rollouts`, ``[B, T]`` on the CPU."""
    sequences = rollouts.sequences().to(model.device)
    return response_log_probs(model, sequences, rollouts.prompts.shape[1]).cpu()


def respond(model: LlamaForCausalLM, task: Task, settings: Settings, seed: int) -> Rollouts:
    """Responses to the held-out prompts: the problems and draws of `GRPO.sample_responses`."""
    problems = task.problems(generator(seed, "held-out problems"), settings.responses)
    return sample(model, task.environment(problems), generator(seed, "held-out samples"))


Sampled = dict[str, Tensor]


def sampled_batch(rollouts: Rollouts) -> Sampled:
    """`rollouts` as `lightning_rejuv.rejuvenate` takes them from a sampler; ``solved`` is for `verify`."""
    return {**rollouts.batch(), "solved": rollouts.solved > 0}


def verify(batch: Mapping[str, Tensor]) -> Tensor:
    """Which responses of a sampled batch solve the task, ``[B]`` bool."""
    return batch["solved"]


class Measures:
    """Measures any start of one seed against its base.

    Args:
        base: The base's checkpoint.
        task: The task.
        settings: Sizes.
        seed: The seed.
        device: Where models are run.
    """

    def __init__(self, base: Path, task: Task, settings: Settings, seed: int, device: str = "cpu") -> None:
        self.calibration: list[Batch] = held_out_demonstrations(task, settings.held_out, seed)
        self.monitor = PlasticityMonitor(anchor=base, probe=self.calibration)
        model = load_model(base).to(device)
        rollouts = respond(model, task, settings, seed)
        self.support = Support(rollouts, teacher_forced(model, rollouts))

    def of(self, model: LlamaForCausalLM) -> dict[str, float | None]:
        """Every measure that needs no RL step."""
        values: dict[str, float | None] = {
            name: float(value) for name, value in self.monitor.measure(model).items()
        }
        values["support"] = self.support.of(model)
        values["verified_support"] = self.support.of(model, self.support.solved)
        return dict(rounded(values))


def rounded(values: Mapping[str, float | None]) -> Iterator[tuple[str, float | None]]:
    """Values for JSON: five digits, None where there is no number."""
    for name, value in values.items():
        yield name, None if value is None or not math.isfinite(value) else round(value, 5)
