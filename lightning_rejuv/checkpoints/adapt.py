"""Adapter in, adapter out: fusion with the base is a scaled update, and the base is not read for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_rejuv import __version__
from lightning_rejuv.alpha import USUAL_ALPHA
from lightning_rejuv.anchor.tensors import is_head
from lightning_rejuv.checkpoints.adapter import Adapter, check_given, check_trained, open_adapter
from lightning_rejuv.checkpoints.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    Checkpoint,
    PathLike,
    open_checkpoint,
    reading,
)
from lightning_rejuv.checkpoints.directory import check_free, new_directory, write_file
from lightning_rejuv.checkpoints.header import build_header
from lightning_rejuv.checkpoints.provenance import Hasher
from lightning_rejuv.checkpoints.record import a_second_time, find_record
from lightning_rejuv.checkpoints.report import CheckpointReport
from lightning_rejuv.checkpoints.sidecar import copy_sidecar, links_out
from lightning_rejuv.checkpoints.skeleton import names_on_disk
from lightning_rejuv.checkpoints.tied_head import tied_embedding
from lightning_rejuv.checkpoints.write_report import check_apart, write_report
from lightning_rejuv.checkpoints.writer import FileWriter
from lightning_rejuv.config import alpha_by_name
from lightning_rejuv.names import bridge, listing
from lightning_rejuv.weights.edit import lerp_
from lightning_rejuv.weights.rounding import random_stream


def rejuvenate_adapter(
    sft: PathLike,
    out: PathLike,
    *,
    base: PathLike | None = None,
    alpha: float | Mapping[str, float] = USUAL_ALPHA,
) -> CheckpointReport:
    """Write the fusion of a LoRA-SFT model with its base, as an adapter for the same base.

    ``W + scale * B @ A`` moves to ``W + alpha * scale * B @ A``, so that only B changes, by ``alpha``; the
    same holds for rank-stabilised LoRA and for embeddings. Tensors that replace the base's
    (``modules_to_save``, trained biases) are interpolated with them, for which the base is read. In half types those
    are rounded stochastically, always in the same way, and B is rounded to nearest: its entries are no steps of the
    dtype apart from zero, so that noise would buy nothing.

    Args:
        sft: directory of the adapter.
        out: directory to write; must not exist.
        base: directory of the base; needed only where the adapter replaces tensors.
        alpha: weight of the SFT model; or one for each pattern of weights' names in the base model.

    Raises:
        ValueError: DoRA, whose fusion is no DoRA of the same form (merge it instead); another kind of
            adapter that cannot be scaled; a tensor of the base is needed and not given.
        FileExistsError: the output exists.
    """
    alpha = check_given(alpha)
    source, target = Path(sft).expanduser(), Path(out).expanduser()
    check_free(target)
    check_apart(target, source, *([Path(base).expanduser()] if base else []))
    adapter, warnings = open_adapter(source), links_out(source)
    warnings += a_second_time(find_record(adapter.files, adapter.files)[0])
    dora = [module for module, lora in adapter.loras.items() if lora.dora]
    if dora:
        raise ValueError(
            f"The adapter {str(source)!r} is DoRA ({listing(dora)}): its fusion with the base is no "
            "adapter of the "
            "same form. Write the whole model with `merge_adapter`."
        )
    names = [*(f"{module}.weight" for module in adapter.loras), *adapter.whole]
    alphas = alpha_by_name(alpha, names)
    files, theirs = adapter.files, open_checkpoint(base, "base") if base and adapter.whole else None
    replaced = _replaced(adapter, theirs)
    check_trained(adapter, theirs, {stored: name for stored, (_, name) in replaced.items()})
    factors = {
        lora.parts[part]: alphas[f"{lora.module}.weight"]
        for lora in adapter.loras.values()
        for part in ("lora_B", "lora_embedding_B", "lora_B.bias")
        if part in lora.parts
    }
    inputs = {"sft": (source, [ADAPTER]), **({"base": (theirs.path, list(theirs.shards))} if theirs else {})}
    with new_directory(target) as partial, Hasher(inputs) as hasher:
        with FileWriter(partial) as writer, reading(files, theirs or files) as (ours, base_reader):
            entries = files.shards[ADAPTER].entries
            table = [(e.name, e.dtype, e.shape) for e in entries]
            writer.write(ADAPTER, build_header(table, files.shards[ADAPTER].metadata))
            for entry in entries:
                tensor = ours.tensor(entry.name)
                if entry.name in factors:
                    tensor = _scaled(tensor, factors[entry.name])
                elif entry.name in replaced:
                    name, base_name = replaced[entry.name]
                    weight, stream = 1.0 - alphas[name], random_stream(entry.name)
                    lerp_(tensor, base_reader.tensor(base_name), weight, generator=stream)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"Expected finite weights but {entry.name!r} holds NaN or infinity.")
                writer.write(ADAPTER, tensor)
        report = CheckpointReport(
            version=__version__,
            output=str(target),
            form="adapter",
            inputs={
                role: {"path": str(p), "sha256": hasher.digests()[role]} for role, (p, _) in inputs.items()
            },
            outputs=writer.digests,
            options={"alpha": alpha, "reset": None},
            alpha=alpha,
            warnings=tuple(warnings),
        )
        copy_sidecar(source, partial, None)
        write_file(partial / ADAPTER_CONFIG, (source / ADAPTER_CONFIG).read_bytes())
        write_report(partial, source, report)
    return report


def _scaled(tensor: Tensor, alpha: float) -> Tensor:
    """Multiply in float32 or better and round once: a lerp toward the base's update, which is zero."""
    return lerp_(tensor, torch.zeros_like(tensor), 1.0 - alpha)


def _replaced(adapter: Adapter, base: Checkpoint | None) -> Mapping[str, tuple[str, str]]:
    """For tensors that replace the base's: the model's name of each and the base's name on disk."""
    if not adapter.whole:
        return {}
    if base is None:
        raise ValueError(
            f"The adapter {str(adapter.files.path)!r} replaces whole tensors of the base "
            f"({listing(adapter.whole)}): "
            "they are interpolated with the base's, so pass `base`."
        )
    names = base_names(list(adapter.whole), base)
    for name, stored in adapter.whole.items():
        ours, theirs = adapter.files.entry(stored).shape, base.entry(names[name]).shape
        if ours != theirs:
            raise ValueError(
                f"Expected {stored!r} to have the base's shape {theirs} but got {ours}. A resized "
                "vocabulary needs "
                "the whole model: merge the adapter with PEFT and pass the merged model."
            )
    return {stored: (name, names[name]) for name, stored in adapter.whole.items()}


def base_names(names: list[str], base: Checkpoint) -> dict[str, str]:
    """Return the base's names on disk of some of the model's parameters; a tied head's is its embedding's.

    Raises:
        ValueError: the base's files hold a parameter in another layout, or do not hold it.
    """
    embedding = tied_embedding(base) if any(map(is_head, names)) else None
    wanted = [name for name in names if not (embedding and is_head(name))]
    rename: Callable[[str], str] | None = bridge([[name] for name in wanted], base.place.keys())
    if wanted and rename is None:
        loaded = names_on_disk(base)
        rename = loaded.__getitem__ if all(name in loaded for name in wanted) else None
    if wanted and rename is None:
        missing = [name for name in wanted if name not in base.place]
        raise ValueError(
            f"Expected the base {str(base.path)!r} to hold {listing(missing)} but its tensors are "
            f"{listing(base.place)}. If it stores them in another layout, merge the adapter with PEFT and pass the "
            "merged model; if it is another model, pass the one that the adapter was trained on."
        )
    return {name: rename(name) if rename and name in wanted else str(embedding) for name in names}
