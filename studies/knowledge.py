"""What a model knows by heart: questions with one answer each, asked without any dialogue around them."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from examples.sft_to_rl.tasks import Task


@torch.no_grad()
def knowledge(model: LlamaForCausalLM, task: Task) -> dict[str, dict[str, float]]:
    """How much of `task.questions()` a model knows, by kind; empty for a task without questions.

    Returns:
        For each kind ``right``, the share of questions whose answer is the most likely token, and ``probability``,
        the mean probability of the answer.
    """
    known = {}
    for kind, questions in task.questions().items():
        logits = model(input_ids=questions.prompts.to(model.device), use_cache=False).logits[:, -1]
        answers = questions.answers.to(model.device)
        probabilities = logits.softmax(dim=-1).gather(1, answers[:, None])
        right = logits.argmax(dim=-1) == answers
        known[kind] = {
            "right": round(float(right.float().mean()), 5),
            "probability": round(float(probabilities.mean()), 5),
        }
    return known
