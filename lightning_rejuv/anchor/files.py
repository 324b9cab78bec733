"""Which files of a checkpoint directory hold its weights: those that transformers loads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rejuv.names import listing

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
_HASHED = 1 << 20  # bytes that are hashed at a time
_MAX_JSON = 1 << 28  # bytes; the index of a million tensors takes less

# Files whose weights are not a model in the form of transformers: an adapter's, and Mistral's own format.
_OTHER_FORMS = ("adapter_", "consolidated")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a directory.

    Attributes:
        names: the names of the safetensors files that hold the weights.
        index: the index file's content, None if one file holds everything.
        left_out: safetensors files beside them that no loader reads: those of an earlier save, or of a variant.
    """

    names: tuple[str, ...]
    index: dict[str, Any] | None
    left_out: tuple[str, ...]


def weight_files(root: Path) -> WeightFiles | None:
    """Find the files that transformers loads from a directory.

    It looks for the file that ``transformers_weights`` in ``config.json`` names, for ``model.safetensors``, and only
    then for the shards of ``model.safetensors.index.json``. A variant (``model.fp16.safetensors``) is loaded only by
    those who name it.

    Args:
        root: the directory.

    Returns:
        The files; None if there are none.

    Raises:
        FileNotFoundError: a file that is named does not exist.
        ValueError: the index, or ``config.json``, is malformed or names files outside the directory; the
            directory holds an adapter for its weights.
    """
    named = read_json(root / CONFIG).get("transformers_weights") if (root / CONFIG).is_file() else None
    single = SINGLE if named is None else str(named)
    index = None
    if (root / SINGLE).is_file() if named is None else not single.endswith(".index.json"):
        _check_beside(root, CONFIG, [single])
        names = [single]
    elif (root / (INDEX if named is None else single)).is_file():
        if named not in (None, INDEX):
            raise ValueError(
                f"Expected the index of the shards in {str(root)!r} to be {INDEX} but `transformers_weights` in "
                f"{CONFIG} names {single!r}. Rename it, and remove the key."
            )
        index = read_json(root / INDEX)
        names = _shards(root, index)
    else:
        return None
    if (root / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"The directory {str(root)!r} holds a model ({names[0]}) and an adapter ({ADAPTER_CONFIG}), which "
            "transformers loads together if PEFT is installed. Merge them, or keep them in two directories."
        )
    left = {file.name for file in root.glob("*.safetensors")} - set(names)
    return WeightFiles(tuple(names), index, tuple(sorted(n for n in left if not n.startswith(_OTHER_FORMS))))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that has to hold a mapping.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not JSON, no mapping, or too large.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the file {path.name!r} in {str(path.parent)!r} but the directory holds "
            f"{listing(os.listdir(path.parent))}."
        )
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(
            f"Expected {str(path)!r} to have at most {_MAX_JSON} bytes but it has {path.stat().st_size}."
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {str(path)!r} to hold a mapping but got {type(content).__name__}.")
    return content


def hash_file(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return a file's SHA-256 in hexadecimal, which ``sha256sum`` prints and the Hugging Face Hub shows.

    Args:
        path: the file.
        stopped: asked after each block; the digest is of no use once it answers True.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while (block := file.read(_HASHED)) and not stopped():
            digest.update(block)
    return digest.hexdigest()


def _shards(root: Path, index: dict[str, Any]) -> list[str]:
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise ValueError(f"Expected `weight_map` in {str(root / INDEX)!r} to map tensor names to file names.")
    names = sorted(set(weights.values()))
    _check_beside(root, INDEX, names)
    return names


def _check_beside(root: Path, by: str, names: list[str]) -> None:
    outside = [n for n in names if n in ("", ".", "..") or "/" in n or "\\" in n or "\0" in n]
    if outside:
        raise ValueError(
            f"Expected {str(root / by)!r} to name files beside it but it names {listing(outside)}."
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(root / by)!r} names weight files that do not exist: {listing(missing)}."
        )
