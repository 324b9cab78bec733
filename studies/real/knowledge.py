"""What a model keeps of what the pretrained model knew: its own answers to ordinary questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from studies.real.logits import response_logits
from studies.real.model import end_of
from studies.real.sampling import sample
from studies.real.texts import Pair, encode_prompt

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Why is the sky blue?",
    "What do bees make?",
    "Write a sentence about a cat.",
    "What is the opposite of hot?",
    "How many days are there in a week?",
    "Who wrote Romeo and Juliet?",
    "What is water made of?",
    "Give me a tip for sleeping better.",
    "Translate 'good morning' into Spanish.",
    "Which planet is closest to the sun?",
    "What is photosynthesis?",
    "Suggest a name for a small dog.",
    "What do you use an umbrella for?",
    "Explain what a library is.",
)
MAX_NEW_TOKENS = 40


class Knowledge:
    """The pretrained model's greedy answers, and how likely it finds them.

    Args:
        path: A JSON file that keeps them.
        tokenizer: Of the model.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self.path, self.tokenizer = path, tokenizer

    def ask(self, pretrained: PreTrainedModel) -> None:
        """Let the pretrained model answer, and write the file; nothing if it is there."""
        if self.path.is_file():
            return
        prompts = [encode_prompt(self.tokenizer, question) for question in QUESTIONS]
        answers = sample(
            pretrained, prompts, 1, MAX_NEW_TOKENS, end=end_of(self.tokenizer), greedy=True
        ).tokens
        pairs = [Pair(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        texts = [self.tokenizer.decode(answer) for answer in answers]
        nll, _ = _of(pretrained, pairs)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"texts": texts, "answers": answers, "nll": nll}, indent=1))
        unfinished.replace(self.path)

    def of(self, model: PreTrainedModel) -> dict[str, float]:
        """Measure a model.

        Returns:
            ``excess_nll``, by how many nats a token the answers are less likely than under the pretrained model; and
            ``agreement``, the share of their tokens that are still the most likely ones.
        """
        known = json.loads(self.path.read_text())
        pairs = [
            Pair(encode_prompt(self.tokenizer, question), answer)
            for question, answer in zip(QUESTIONS, known["answers"], strict=True)
        ]
        nll, agreement = _of(model, pairs)
        return {"excess_nll": round(nll - known["nll"], 5), "agreement": round(agreement, 5)}


@torch.no_grad()
def _of(model: PreTrainedModel, pairs: list[Pair]) -> tuple[float, float]:
    """Mean negative log-likelihood of a token, nats, and how many tokens are the most likely ones."""
    logits: Tensor
    logits, tokens = response_logits(model, pairs)
    log_probs = logits.log_softmax(dim=-1)
    nll = -log_probs.gather(1, tokens[:, None]).mean()
    return float(nll), float((log_probs.argmax(dim=-1) == tokens).float().mean())
