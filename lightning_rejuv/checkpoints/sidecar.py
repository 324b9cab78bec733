"""The files beside the weights: config, tokenizer, chat template, index, and which of them an output takes over."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv.anchor.files import ADAPTER_CONFIG, CONFIG, INDEX
from lightning_rejuv.anchor.links import lies_within
from lightning_rejuv.checkpoints.output import write_file
from lightning_rejuv.checkpoints.reader import Checkpoint
from lightning_rejuv.names import listing

# Weights in any form, and what a trainer leaves for its own resumption. Every other file is copied.
_LEFT_BEHIND = re.compile(
    r"\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|pkl|npz|distcp|part)$"
    r"|\.(?:safetensors|bin|h5)\.index\.json$"
    r"|^(?:trainer_state|all_results|train_results|eval_results)\.json$"
    r"|^(?:rejuvenation\.(?:json|yaml)|README\.md|latest|zero_to_fp32\.py|training_args\..*)$|^\."
)
_FOLDERS = ("additional_chat_templates",)


def sidecar_files(directory: Path) -> list[Path]:
    """Return the files beside the weights that the output takes over: config, tokenizer, chat template and the like.

    Returns:
        Their names, relative to the directory, sorted. Links that lead out of it are not among them, see
        :func:`links_out`.
    """
    return [
        name for name in _beside(directory) if (directory / name).is_file() and lies_within(directory, name)
    ]


def links_out(directory: Path) -> list[str]:
    """Return a sentence, for the report, on links and special files that are not copied.

    Raises:
        ValueError: one of them stands in the place of the config, without which the output would be no checkpoint.
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
        target: the directory that they are copied into.
        dtype: of the output if it is another than the checkpoint's; ``config.json`` then says so.
        without: names that are left out, for example because the target holds them already.
    """
    for file in sidecar_files(source):
        if str(file) in (*without, ADAPTER_CONFIG):
            continue
        content = (source / file).read_bytes()
        if str(file) == CONFIG and dtype is not None:
            content = _with_dtype(content, dtype)
        (target / file).parent.mkdir(exist_ok=True)
        write_file(target / file, content)


def write_index(checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, size: int) -> None:
    """Write the index of an output that has a checkpoint's names and shards; nothing if one file holds everything.

    Args:
        checkpoint: what the output has the names and shards of.
        target: the directory to write into.
        dtype: of the output if it is another than the checkpoint's.
        size: how many bytes the output's tensors have.
    """
    if checkpoint.index is None:
        return
    if dtype is None and not checkpoint.renamed:
        content = (checkpoint.path / INDEX).read_bytes()
    else:
        metadata = checkpoint.index.get("metadata")
        metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
        content = (json.dumps({**checkpoint.index, "metadata": metadata}, indent=2) + "\n").encode()
    write_file(target / INDEX, content)


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
