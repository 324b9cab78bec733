"""The same RL by TRL's `GRPOTrainer`, from the directory as it was written: nothing depends on the study's own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from studies.real.model import load_model
from studies.real.recipes import RL
from studies.real.tasks import Problem, reward
from studies.real.texts import encode_prompt

_CURVES = {
    "reward": "reward",
    "frac_reward_zero_std": "zero_variance",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grad_norm": "grad_norm",
}


def reinforce_with_trl(
    directory: Path, tokenizer: Any, problems: Sequence[Problem], rl: RL, device: str, seed: int
) -> tuple[PreTrainedModel, dict[str, list[float]]]:
    """Reinforce the model in a directory; return it with the curves that TRL logs.

    Args:
        directory: Model and tokenizer.
        tokenizer: The tokenizer.
        problems: ``rl.steps * rl.prompts`` of them.
        rl: The budget.
        device: ``cpu`` or ``cuda``.
        seed: Of everything random in TRL.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [
        {"prompt": tokenizer.decode(encode_prompt(tokenizer, problem.question)), "index": index}
        for index, problem in enumerate(problems)
    ]

    def verified(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        # Decoded here: TRL's own text leaves the end of the turn out, without which a cut response would count.
        texts = [tokenizer.decode(ids) for ids in completion_ids]
        return [reward(problems[number], text) for text, number in zip(texts, index, strict=True)]

    with tempfile.TemporaryDirectory() as out:
        arguments = GRPOConfig(
            output_dir=out,
            max_steps=rl.steps,
            per_device_train_batch_size=rl.prompts * rl.group,
            num_generations=rl.group,
            max_completion_length=rl.max_new_tokens,
            learning_rate=rl.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.99,
            weight_decay=0.0,
            max_grad_norm=1.0,
            temperature=rl.temperature,
            top_k=0,
            beta=0.0,
            scale_rewards="group",
            loss_type="dapo",
            bf16=False,
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=seed % 2**32,
        )
        trainer = GRPOTrainer(
            model=load_model(directory),
            reward_funcs=verified,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    curves: dict[str, list[float]] = {name: [] for name in _CURVES.values()}
    for line in trainer.state.log_history:
        for theirs, ours in _CURVES.items():
            if theirs in line:
                curves[ours].append(float(line[theirs]))
    return trainer.model, curves
