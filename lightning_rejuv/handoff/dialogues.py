"""Calibration data from JSONL: prompts and responses, tokenised as the SFT model saw them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv.calibration import IGNORED

_FORM = '{"prompt": TEXT, "response": TEXT} or {"messages": [{"role": …, "content": …}, …]}'


@dataclass(frozen=True)
class Dialogue:
    """One line: what stands before the response and the response, as text with all special tokens."""

    prompt: str
    response: str


def read_dialogues(path: Path, tokenizer: Any) -> list[Dialogue]:
    """Read and render a JSONL file.

    ``{"prompt", "response"}`` is taken as it is, the response ended with the tokenizer's EOS. In
    ``{"messages"}`` the last message has to be the assistant's: it is the response, and all of it is
    rendered with the tokenizer's own chat template.

    Raises:
        ValueError: a line is not of this form, with its number; or there is none.
        OSError: the file cannot be read.
    """
    dialogues = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Expected {where} to be JSON: {error}.") from error
        dialogues.append(_dialogue(content, tokenizer, where))
    if not dialogues:
        raise ValueError(f"Expected lines of the form {_FORM} in {str(path)!r} but the file is empty.")
    return dialogues


def tokenize(
    dialogues: Sequence[Dialogue], tokenizer: Any, batch_size: int = 8, max_tokens: int = 4096
) -> list[dict[str, Tensor]]:
    """Return batches as a causal language model takes them, padded on the right.

    Args:
        dialogues: the pairs.
        tokenizer: the SFT model's.
        batch_size: pairs in a batch.
        max_tokens: longer pairs lose the end of their response.

    Raises:
        ValueError: a prompt leaves no room for its response.
    """
    pairs = []
    for number, dialogue in enumerate(dialogues, start=1):
        # A rendered template holds its special tokens already; a plain prompt needs the tokenizer's BOS.
        prompt = tokenizer(
            dialogue.prompt, add_special_tokens=not _starts_special(dialogue.prompt, tokenizer)
        )
        response = tokenizer(dialogue.response, add_special_tokens=False)["input_ids"]
        ids = prompt["input_ids"]
        if not response or len(ids) >= max_tokens:
            raise ValueError(
                f"Expected pair {number} to have a response and a prompt of fewer than {max_tokens} tokens "
                "but "
                f"got {len(ids)} prompt tokens and {len(response)} response tokens."
            )
        pairs.append((list(ids), list(response)[: max_tokens - len(ids)]))
    padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return [_batch(pairs[i : i + batch_size], padding) for i in range(0, len(pairs), batch_size)]


def _starts_special(text: str, tokenizer: Any) -> bool:
    return any(text.lstrip().startswith(token) for token in tokenizer.all_special_tokens)


def _batch(pairs: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.full((len(pairs), width), padding)
    labels = torch.full((len(pairs), width), IGNORED)
    mask = torch.zeros((len(pairs), width), dtype=torch.int64)
    for row, (prompt, response) in enumerate(pairs):
        start, stop = len(prompt), len(prompt) + len(response)
        ids[row, :stop] = torch.tensor(prompt + response)
        labels[row, start:stop] = torch.tensor(response)
        mask[row, :stop] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _dialogue(content: Any, tokenizer: Any, where: str) -> Dialogue:
    if isinstance(content, dict) and "messages" in content:
        return _rendered(content["messages"], tokenizer, where)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), str) for k in ("prompt", "response")
    ):
        raise ValueError(f"Expected {where} to be of the form {_FORM} but got {content!r:.200}.")
    response, eos = content["response"], tokenizer.eos_token or ""
    return Dialogue(content["prompt"], response if response.endswith(eos) else response + eos)


def _rendered(messages: Any, tokenizer: Any, where: str) -> Dialogue:
    fine = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not fine or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"Expected the messages in {where} to end with the assistant's but got {messages!r:.200}."
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} holds messages but the SFT model's tokenizer has no chat template to render them with. "
            'Bring plain text as {"prompt", "response"}, or save the template with the tokenizer.'
        )
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if not whole.startswith(prompt):
        raise ValueError(
            f"The SFT model's chat template renders {where} so that the dialogue does not begin with its "
            "prompt: "
            f'{prompt!r:.120} and {whole!r:.120}. Bring it rendered, as {{"prompt", "response"}}.'
        )
    return Dialogue(prompt, whole[len(prompt) :])
