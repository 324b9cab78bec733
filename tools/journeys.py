"""How much of the package a reader passes through: functions and files that run on the way of a few plain calls.

python -m tools.journeys
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_rejuv
from lightning_rejuv import PlasticityMonitor, Reset, rejuvenate
from lightning_rejuv.checkpoints import rejuvenate_checkpoint
from lightning_rejuv.functional import token_entropy

PACKAGE = f"{Path(lightning_rejuv.__file__).parent}{os.sep}"


def calls(journey: Callable[[], Any]) -> Counter[CodeType]:
    """Return how often each function of the package was called in this thread; comprehensions are no functions."""
    found: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _arg: Any) -> None:
        code = frame.f_code
        is_function = (
            code.co_flags & inspect.CO_OPTIMIZED and "<" not in code.co_name
        )  # no class body, no module
        if event == "call" and is_function and code.co_filename.startswith(PACKAGE):
            found[code] += 1

    sys.setprofile(note)
    try:
        journey()
    finally:
        sys.setprofile(None)
    return found


def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Return a tiny base and a model that was moved away from it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    sft = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in sft.parameters():
            parameter.mul_(1.1)
    return base.eval(), sft.eval()


def main() -> None:
    """Print a row for each journey."""
    base, sft = models()
    ids = torch.randint(0, 23, (4, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.where(torch.arange(9) > 3, -100)}
    tensors = len(list(sft.named_parameters()))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = [Path(folder) / name for name in ("sft", "base", "out")]
        sft.save_pretrained(paths[0])
        base.save_pretrained(paths[1])
        on_disk = calls(lambda: rejuvenate_checkpoint(*paths, alpha=0.4))
        monitor = PlasticityMonitor(anchor=base.state_dict(), probe=[batch])
        rows = {
            "fusion in memory": calls(lambda: rejuvenate(copy.deepcopy(sft), base, alpha=0.4)),
            "the same with a reset": calls(
                lambda: rejuvenate(
                    copy.deepcopy(sft), base, [batch], alpha=0.4, reset=Reset(0.1, positions="entropy_gap")
                )
            ),
            "logits to entropy": calls(lambda: token_entropy(torch.zeros(1, 2, 5))),
            "monitor.measure": calls(lambda: monitor.measure(sft)),
            "directory to directory": on_disk,
            "of these, for each tensor": Counter({c: n for c, n in on_disk.items() if n >= tensors}),
        }
    print(f"{'journey':<28}{'functions':>10}{'files':>7}")
    for name, found in rows.items():
        print(f"{name:<28}{len(found):>10}{len({code.co_filename for code in found}):>7}")


if __name__ == "__main__":
    main()
