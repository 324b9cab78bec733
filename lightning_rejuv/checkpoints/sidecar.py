"""The files beside the weights: config, tokenizer, chat template, generation config. All the SFT model's."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv.anchor.links import lies_within
from lightning_rejuv.checkpoints.checkpoint import ADAPTER_CONFIG, CONFIG, INDEX
from lightning_rejuv.checkpoints.directory import write_file
from lightning_rejuv.names import listing

REPORT = "rejuvenation.json"
RECIPE = "rejuvenation.yaml"
CARD = "README.md"

# Weights in any form, and what a trainer leaves for its own resumption. Everything else is handed on.
_LEFT_BEHIND = re.compile(
    r"\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|pkl|npz|distcp|part)$"
    r"|\.(?:safetensors|bin|h5)\.index\.json$"
    r"|^(?:trainer_state|all_results|train_results|eval_results)\.json$"
    r"|^(?:rejuvenation\.(?:json|yaml)|README\.md|latest|zero_to_fp32\.py|training_args\..*)$|^\."
)
_FOLDERS = ("additional_chat_templates",)


def sidecar_files(directory: Path) -> list[Path]:
    """Return the files that a rejuvenated checkpoint takes over, relative to the directory, sorted.

    Links that lead out of it are none of them: see :func:`links_out`.
    """
    return [
        name for name in _beside(directory) if (directory / name).is_file() and lies_within(directory, name)
    ]


def links_out(directory: Path) -> list[str]:
    """Return a sentence for what is not taken over because it is no file of the checkpoint, for the report.

    Raises:
        ValueError: the config, without which the output would be no checkpoint, is one of them.
    """
    out = [
        str(name)
        for name in _beside(directory)
        if not ((directory / name).is_file() and lies_within(directory, name))
        and ((directory / name).is_symlink() or not (directory / name).is_dir())
    ]
    for name in (CONFIG, ADAPTER_CONFIG, INDEX):
        if os.path.lexists(directory / name) and not lies_within(directory, name):
            raise ValueError(
                f"Expected {name} in {str(directory)!r} to lie there but it is a link that leads out of the "
                "checkpoint. Put a copy in its place."
            )
    if not out:
        return []
    return [
        f"not copied from {str(directory)!r}, because they are no files or links that lead out of it: {listing(out)}"
    ]


def _beside(directory: Path) -> list[Path]:
    names = [Path(f.name) for f in directory.iterdir() if not _LEFT_BEHIND.search(f.name)]
    for folder in _FOLDERS:
        if (directory / folder).is_dir() and lies_within(directory, folder):
            names += [Path(folder, f.name) for f in (directory / folder).iterdir()]
    return sorted(names)


def copy_sidecar(
    source: Path, target: Path, dtype: torch.dtype | None, without: tuple[str, ...] = ()
) -> None:
    """Copy the files beside the weights, byte for byte.

    Args:
        source: the checkpoint that they belong to.
        target: where they go.
        dtype: of the output where it is another; ``config.json`` then says so.
        without: names that are left out, or are there already.
    """
    for file in sidecar_files(source):
        if str(file) in (*without, ADAPTER_CONFIG):
            continue
        content = (source / file).read_bytes()
        if str(file) == CONFIG and dtype is not None:
            content = _with_dtype(content, dtype)
        (target / file).parent.mkdir(exist_ok=True)
        write_file(target / file, content)


def new_index(index: dict[str, Any], total_bytes: int) -> bytes:
    """Return an index file for the same tensors in the same shards, with another total size."""
    before = index.get("metadata")
    metadata = {**(before if isinstance(before, dict) else {}), "total_size": total_bytes}
    return (json.dumps({**index, "metadata": metadata}, indent=2) + "\n").encode()


def index_bytes(directory: Path) -> bytes:
    """Return the index file as it is."""
    return (directory / INDEX).read_bytes()


def sidecar_size(directory: Path) -> int:
    """Return how many bytes the files beside the weights have."""
    return sum(os.stat(directory / file).st_size for file in sidecar_files(directory))


def _with_dtype(content: bytes, dtype: torch.dtype) -> bytes:
    config = json.loads(content)
    name = str(dtype).removeprefix("torch.")
    _rename_dtype(config, name)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _rename_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict) and key.endswith("_config"):
            _rename_dtype(value, name)
