"""Small checkpoint directories to work on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lightning_rejuv.checkpoints import rejuvenate_checkpoint
from tests.checkpoints.families import tiny
from tests.conftest import shifted

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{% if m['role'] == 'assistant' %} </s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def write_tokenizer(path: Path, words: list[str] | None = None, template: str | None = TEMPLATE) -> None:
    """A word-level tokenizer whose ids are the words' places."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = words if words is not None else [*WORDS, *(f"w{i}" for i in range(48 - len(WORDS)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)


def pair(
    path: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: bool = True,
    drift: float = 0.05,
    **changes,
) -> tuple[Path, Path]:
    """A base and an SFT model, sharded, with tokenizers; only the SFT model has a chat template."""
    base = tiny(family, 0, dtype, **changes)
    sft = shifted(base, drift)
    base.save_pretrained(path / "base")
    sft.save_pretrained(path / "sft", max_shard_size="16KB")
    if tokenizer:
        write_tokenizer(path / "base", template=None)
        write_tokenizer(path / "sft")
    return path / "base", path / "sft"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, by name on disk, read by the reference implementation."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def edit_config(path: Path, **changes) -> None:
    """Change some keys of config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def write_calibration(path: Path, lines: int = 6) -> Path:
    """Dialogues over the tokenizer's words."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i} w{i + 1}"},
                {"role": "assistant", "content": f"w{i + 2} w1"},
            ]
        }
        for i in range(lines)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def teach(sft: Path, calibration: Path, steps: int = 30, rate: float = 3e-3) -> None:
    """What SFT does: some steps on demonstrations, which are likelier then than they are to the base."""
    from transformers import AutoModelForCausalLM

    from lightning_rejuv.checkpoints.dialogues import read_dialogues, tokenize
    from lightning_rejuv.checkpoints.models import load_tokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft), load_tokenizer(sft)
    dtype = model.dtype
    optimizer = torch.optim.Adam(model.float().parameters(), lr=rate)
    for _ in range(steps):
        for batch in tokenize(read_dialogues(calibration, tokenizer), tokenizer):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    size = "16KB" if (sft / "model.safetensors.index.json").is_file() else "1GB"
    for file in sft.glob("model*"):
        file.unlink()
    model.to(dtype).save_pretrained(sft, max_shard_size=size)


def known_pair(path: Path) -> tuple[Path, Path, Path]:
    """A confident base, an SFT model that is surer still, and as calibration data what the base says and SFT taught."""
    base = tiny("llama", 0, torch.float32)
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(3)
        sft = shifted(base, 0.005)
        sft.get_output_embeddings().weight.mul_(2)
    for model, name in ((base, "base"), (sft, "sft")):
        model.save_pretrained(path / name)
        write_tokenizer(path / name)
    rows = []
    for first in range(8, 20):
        ids = torch.tensor([[first, first + 1]])
        for _ in range(3):
            logits = base(ids).logits[:, -1]
            logits[:, : len(WORDS)] = -torch.inf  # words alone, so that the text gives the same tokens
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        words = [f"w{i - len(WORDS)}" for i in ids[0].tolist()]
        rows.append({"prompt": " ".join(words[:2]), "response": " ".join(words[2:])})
    calibration = path / "calibration.jsonl"
    calibration.write_text("\n".join(json.dumps(row) for row in rows))
    teach(path / "sft", calibration)
    return path / "base", path / "sft", calibration


def fuse(base, sft, **options):
    """Fuse into a new directory beside them; return it and the report."""
    out = sft.parent / f"out{len(list(sft.parent.iterdir()))}"
    report = rejuvenate_checkpoint(base, sft, out, **{"alpha": 0.5, **options})
    return out, report


def resave(path, change):
    """Rewrite a directory as one file with some tensors changed."""
    state = change(tensors(path))
    for file in (*path.glob("*.safetensors"), *path.glob("*.index.json")):
        file.unlink()
    save_file(
        {name: t.contiguous() for name, t in state.items()}, path / "model.safetensors", {"format": "pt"}
    )
