"""A miniature of the real model: sums without reasoning_gym, a tokenizer of characters, a random Llama."""

from __future__ import annotations

import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from studies.real.recipes import RL, Part, Recipe, Texts
from studies.real.tasks import Problem

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
LETTERS = "\n 0123456789+-=.,?:'" + "".join(chr(c) for k in (65, 97) for c in range(k, k + 26))
END = SPECIAL.index("<|im_end|>")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for a character, and the markers of the chat format."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>")


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> LlamaForCausalLM:
    """A random Llama with grouped queries and tied embeddings, as the real one has."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(LETTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, scale)
    return model.to(dtype)


class Sums:
    """Stands for a split of reasoning_gym's ``chain_sum``.

    Args:
        terms: How many a sum has.
    """

    def __init__(self, terms: int) -> None:
        self.terms = terms

    def draw(self, count: int, seed: int) -> list[Problem]:
        """Problem i of seed s is drawn from ``Random(s + i)``, as reasoning_gym does."""
        return [self._one(random.Random(seed + index)) for index in range(count)]

    def _one(self, draws: random.Random) -> Problem:
        expression = str(draws.randrange(3))
        for _ in range(self.terms - 1):
            expression += f" {draws.choice('+-')} {draws.randrange(3)}"
        right = str(eval(expression))
        entry = {"metadata": {"expression": expression}}
        return Problem(f"{expression} =", right, entry, lambda answer: answer == right)


SPLITS = {f"sum{n}": Sums(n) for n in (2, 3, 4)}


def recipe(name: str = "T", middle: bool = True) -> Recipe:
    """All stages in seconds; nothing is learned."""
    return Recipe(
        name,
        "a miniature",
        middle=Texts((Part("sum2", "worked", 16),), 1e-2, 4, (8,)) if middle else None,
        sft=Texts((Part("sum2", "terse", 4), Part("sum3", "worked", 4)), 1e-2, 4, (1, 4)),
        moderate=1,
        excessive=4,
        rl=RL("sum2", steps=2, prompts=2, group=4, learning_rate=1e-3, max_new_tokens=12),
        evaluation=(4, 2),
        out_of_distribution_evaluation=(3, 2),
    )
