"""Whether a checkpoint directory is whole and loadable: whatever a trainer would fail on is found beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv.anchor.files import hash_file, read_json
from lightning_rejuv.checkpoints.adapter import is_adapter, open_adapter
from lightning_rejuv.checkpoints.checks import (
    Finding,
    check_generation,
    check_tokenizer,
    check_tying,
    check_vocabulary,
)
from lightning_rejuv.checkpoints.models import loads, skeleton
from lightning_rejuv.checkpoints.output import REPORT
from lightning_rejuv.checkpoints.reader import Checkpoint, open_checkpoint, reading
from lightning_rejuv.checkpoints.stream import all_finite
from lightning_rejuv.config import PathLike
from lightning_rejuv.names import listing
from lightning_rejuv.ops.blocked import one_thread
from lightning_rejuv.progress import Listener, advance, phase, reporting

_PIECE = 1 << 20


@dataclass(frozen=True)
class Verification:
    """Everything that was checked in a directory; true if nothing is a fault. ``print(verification)`` lists it."""

    path: str
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return all(finding.ok is not False for finding in self.findings)

    def __str__(self) -> str:
        verdict = "whole and loadable" if self else "NOT usable"
        return "\n".join([f"{self.path}: {verdict}", *map(str, self.findings)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists, dicts and strings."""
        return {"path": self.path, "ok": bool(self), "findings": [vars(finding) for finding in self.findings]}


def verify(path: PathLike, progress: Listener | None = None) -> Verification:
    """Check a checkpoint directory, or a LoRA adapter's, without loading a model into memory.

    Index, headers and shapes; that transformers' model of this config has exactly these tensors; NaN and
    infinity; dtypes; tying; vocabulary; tokenizer, chat template, EOS and generation config; and, if
    ``rejuvenation.json`` has the hashes of what was written, that the files are still the same.

    Args:
        path: the directory.
        progress: called with the name of each phase, how much of it is done, and how much there is to do.

    Returns:
        The findings. A file that cannot be read is a finding, not an exception.

    >>> bool(verify("nowhere"))
    False
    """
    root = Path(path)
    try:
        adapter = is_adapter(root)
        checkpoint = open_adapter(root).files if adapter else open_checkpoint(root)
    except (ValueError, OSError) as error:
        return Verification(str(root), (Finding("index and headers", False, str(error)),))
    files = f"{len(checkpoint.place)} tensors in {len(checkpoint.shards)} files, {checkpoint.nbytes:,} bytes"
    findings = [Finding("index and headers", True, files)]
    checks: dict[str, _Check] = {"values": _values, **(_ADAPTER if adapter else _MODEL)}
    with reporting(progress):
        for name, check in checks.items():
            try:
                findings += check(checkpoint)
            except (ValueError, OSError) as error:
                findings.append(Finding(name, False, str(error)))
    return Verification(str(root), tuple(findings))


def _values(checkpoint: Checkpoint) -> Iterator[Finding]:
    bad = []
    with phase("reading the weights", checkpoint.nbytes), one_thread(), reading(checkpoint) as (reader,):
        for name, (_, entry) in checkpoint.place.items():
            for start in range(0, entry.numel, _PIECE):
                piece = reader.read(name, start, min(_PIECE, entry.numel - start))
                advance(piece.nbytes)
                if not _is_finite(piece):
                    bad.append(name)
                    break
    yield Finding("values", not bad, f"NaN or infinity in {listing(bad)}" if bad else "all finite")


def _is_finite(piece: torch.Tensor) -> bool:
    return not piece.dtype.is_floating_point or piece.dtype.itemsize == 1 or all_finite(piece)


def _dtypes(checkpoint: Checkpoint) -> Iterator[Finding]:
    sizes: dict[str, int] = {}
    for _, entry in checkpoint.place.values():
        if entry.dtype.is_floating_point:
            name = str(entry.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + entry.numel
    said = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    text = ", ".join(f"{size:,} weights in {name}" for name, size in sorted(sizes.items()))
    fits = said is None or not sizes or max(sizes, key=lambda name: sizes[name]) == said
    yield Finding("dtypes", True if fits else None, f"{text}; config.json says {said}")


def _architecture(checkpoint: Checkpoint) -> Iterator[Finding]:
    custom = bool(checkpoint.config.get("auto_map"))
    try:
        model = skeleton(checkpoint.path)
    except ImportError as error:
        yield Finding("architecture", None, f"not checked: {error}")
        return
    except ValueError as error:
        if not custom:
            raise
        yield Finding("architecture", None, f"not checked: custom code ({error})")
        return
    if model is None:
        unchecked = "custom code" if custom else "transformers does not know this model"
        yield Finding("architecture", None, f"not checked: {unchecked}")
        return
    found, name = loads(model, checkpoint), type(model).__name__
    if (found["missing"] or found["shapes"]) and custom:  # transformers' own model is not the checkpoint's
        yield Finding("architecture", None, f"not checked: custom code (it is no {name})")
    elif found["missing"] or found["shapes"]:
        detail = f"missing {listing(found['missing'])}, of another shape {listing(found['shapes'])}"
        yield Finding("architecture", False, f"{name}: {detail}, unexpected {listing(found['unused'])}")
    elif found["unused"]:
        yield Finding("architecture", None, f"{name}: loads, but has no use for {listing(found['unused'])}")
    else:
        yield Finding("architecture", True, f"{name}: every tensor is there, in its shape")


def _hashes(checkpoint: Checkpoint) -> Iterator[Finding]:
    if not (checkpoint.path / REPORT).is_file():
        return
    said = read_json(checkpoint.path / REPORT).get("outputs")
    if not isinstance(said, dict) or said.keys() != checkpoint.shards.keys():
        text = f"{REPORT} does not name the weight files {listing(checkpoint.shards)}"
        yield Finding("hashes", False, text)
        return
    if not any(said.values()):
        text = f"not checked: {REPORT} holds none, so that there is nothing to compare the files with"
        yield Finding("hashes", None, text)
        return
    changed = [name for name in checkpoint.shards if hash_file(checkpoint.path / name) != said[name]]
    fine = f"{len(said)} files are as they were written"
    yield Finding("hashes", not changed, f"{listing(changed)} differ from {REPORT}" if changed else fine)


_Check = Callable[[Checkpoint], Iterator[Finding]]
_ADAPTER: dict[str, _Check] = {"tokenizer": check_tokenizer, "hashes": _hashes}
_MODEL: dict[str, _Check] = {
    "dtypes": _dtypes,
    "tying": check_tying,
    "architecture": _architecture,
    "vocabulary": check_vocabulary,
    "tokenizer": check_tokenizer,
    "generation config": check_generation,
    "hashes": _hashes,
}
