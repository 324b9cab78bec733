"""Adapter in, whole model out: ``base + alpha * update``, computed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_rejuv import __version__
from lightning_rejuv.anchor.header import Entry
from lightning_rejuv.anchor.tensors import is_head
from lightning_rejuv.checkpoints.adapter import (
    ADAPTER,
    Adapter,
    Lora,
    check_given,
    check_trained,
    for_base,
    open_adapter,
)
from lightning_rejuv.checkpoints.models import CustomCode
from lightning_rejuv.checkpoints.names import base_names
from lightning_rejuv.checkpoints.options import check_dtype, check_seed
from lightning_rejuv.checkpoints.output import check_apart, check_free, check_room, new_directory
from lightning_rejuv.checkpoints.pairing import Pair
from lightning_rejuv.checkpoints.reader import (
    Checkpoint,
    Reader,
    check_fusable,
    grid,
    left_out,
    open_checkpoint,
    reading,
)
from lightning_rejuv.checkpoints.record import a_second_time, find_record
from lightning_rejuv.checkpoints.report import CheckpointReport, write_report
from lightning_rejuv.checkpoints.sidecar import copy_sidecar, links_out, sidecar_files, write_index
from lightning_rejuv.checkpoints.stream import DTYPES, Edit, FusionStream, output_dtypes, output_size
from lightning_rejuv.checkpoints.tying import check_still_tied, embedding_names, tied_embedding
from lightning_rejuv.checkpoints.vocabulary import token_ids
from lightning_rejuv.checkpoints.writer import FileWriter, Hasher
from lightning_rejuv.config import USUAL_ALPHA, Options, PathLike, Rounding, alpha_by_name
from lightning_rejuv.names import listing
from lightning_rejuv.progress import Listener, reporting
from lightning_rejuv.weights.lora import with_lengths
from lightning_rejuv.weights.rounding import HALF_TYPES

# One tokenizer is never put together from two: if the adapter has its own, none of the base's files is used.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
)


def merge_adapter(
    base: PathLike,
    sft: PathLike,
    out: PathLike,
    *,
    alpha: float | str | Mapping[str, float] = USUAL_ALPHA,
    dtype: str | None = None,
    rounding: Rounding = "stochastic",
    seed: int = 0,
    hashes: bool = True,
    progress: Listener | None = None,
) -> CheckpointReport:
    """Write the fusion of a LoRA-SFT model with its base as a whole model, in the base's layout.

    LoRA, rank-stabilised LoRA and DoRA, on linear layers, embeddings and Conv1D; ``modules_to_save`` and
    trained biases. The update is never rounded by itself. Tokenizer and chat template are the adapter's if it
    has them.

    Args:
        base: directory of the base.
        sft: directory of the adapter.
        out: directory to write; must not exist.
        alpha: weight of the SFT model, or one for each pattern of the base's names on disk, as a mapping or as a YAML
            file that holds one; 1 merges without fusion.
        dtype: of the output; by default the base's.
        rounding: see :func:`rejuvenate_checkpoint`; rounding to nearest drops an update below half a step.
        seed: of stochastic rounding; refused with any other, and if no weight is written in a half type.
        hashes: see :func:`rejuvenate_checkpoint`.
        progress: see :func:`rejuvenate_checkpoint`.

    Raises:
        ValueError: the base does not hold a weight that the adapter updates, in its shape.
        FileExistsError: the output exists.
        OSError: reading or writing failed.
    """
    given = check_given(alpha)
    asked = Options(alpha=given, rounding=rounding, seed=seed)
    check_dtype(dtype)
    root, source, target = (Path(path).expanduser() for path in (base, sft, out))
    check_free(target)
    check_apart(target, root, source)
    adapter, opened = open_adapter(source), open_checkpoint(root, "base")
    check_fusable(opened, "base")
    adapter = for_base(adapter, opened)
    warnings = (*links_out(root), *links_out(source), *left_out(opened, "base"))
    before, _ = find_record(adapter.files, opened)
    if given != 1.0:
        warnings = (*warnings, *a_second_time(before))
    touched, heads = _touched(adapter, opened)
    _check_tied(adapter, opened, touched, heads)
    check_trained(adapter, opened, {u: n for n, u in (*touched.items(), *heads) if isinstance(u, str)})
    _check_tokens(source, opened)
    edit = Edit(
        alpha_by_name(given, list(touched)),
        DTYPES[dtype] if dtype else None,
        asked.rounding == "stochastic",
        asked.seed,
    )
    dtypes = output_dtypes(opened, edit.dtype).values()
    check_seed(asked, dtypes)
    pairs = {name: Pair(name, name if name in touched else None) for name in opened.place}
    size = output_size(opened, edit.dtype)
    check_room(target, size)
    inputs = {"base": (root, list(opened.shards)), "sft": (source, [ADAPTER])}
    with new_directory(target) as partial, Hasher(partial, inputs, ["base"], hashes) as hasher:
        with FileWriter(partial, hashes) as writer, reading(opened, adapter.files) as (base_reader, files):
            rows, seen = _MergedRows(touched, base_reader, files), hasher.seen("base")
            stream = FusionStream(opened, opened, pairs, edit, rows, (seen, seen))
            with reporting(progress):
                stream.write(writer)
        own = [str(file) for file in sidecar_files(source)]
        copy_sidecar(source, partial, None)
        copy_sidecar(
            root, partial, edit.dtype, without=(*own, *_TOKENIZER) if "tokenizer_config.json" in own else ()
        )
        write_index(opened, partial, edit.dtype, size)
        found = hasher.report()
        if before:
            found["sft"]["rejuvenated"] = before.to_dict()
        report = CheckpointReport(
            version=__version__,
            output=str(target),
            form="model",
            inputs=found,
            outputs=writer.digests,
            options={
                "alpha": given,
                "reset": None,
                "merge": True,
                "dtype": dtype,
                "rounding": None if HALF_TYPES.isdisjoint(dtypes) else asked.rounding,
                "seed": asked.seed,
                "hashes": hashes,
            },
            alpha=given,
            tensors=stream.measured,
            warnings=warnings,
        )
        write_report(partial, source, report)
    return report


class _MergedRows:
    """Rows of the SFT model's weights: the base's plus the adapter's update, in float32 or better."""

    def __init__(self, touched: dict[str, Lora | str], base: Reader, files: Reader) -> None:
        self._files, self._touched, self._base = files, touched, base
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def __call__(self, entry: Entry, start: int, stop: int) -> Tensor:
        update = self._touched[entry.name]
        columns = grid(entry.shape)[1]
        if isinstance(update, str):
            return self._files.read(update, start * columns, (stop - start) * columns).view(-1, columns)
        base = self._base.rows(entry, start, stop)
        exact = torch.promote_types(base.dtype, torch.float32)
        parts = self._parts(update, exact)
        if update.embedding or update.transposed:
            delta: Tensor = parts["A"][:, start:stop].T @ parts["B"].T
        else:
            delta = parts["B"][start:stop] @ parts["A"]
        merged: Tensor = base.to(exact) + update.scale * delta
        if update.dora:
            merged = with_lengths(merged, parts["magnitude"][start:stop])
        return merged

    def _parts(self, lora: Lora, dtype: torch.dtype) -> dict[str, Tensor]:
        if self._held[0] != lora.module:
            parts = {matrix: self._files.tensor(lora.stored(matrix)).to(dtype) for matrix in "AB"}
            if lora.dora:
                magnitude = self._files.tensor(lora.parts["lora_magnitude_vector"])
                parts["magnitude"] = magnitude.to(dtype).flatten()
            self._held = lora.module, parts
        return self._held[1]


def _check_tied(
    adapter: Adapter, base: Checkpoint, touched: dict[str, Lora | str], heads: list[tuple[str, Lora | str]]
) -> None:
    name = tied_embedding(base)
    if name is None or (name not in touched and not heads):
        return
    with reading(base, adapter.files) as (reader, files):

        def rows(update: Lora | str | None) -> _MergedRows | None:
            return None if update is None else _MergedRows({name: update}, reader, files)

        head = heads[0][1] if heads else None
        saved = any(is_head(f"{module}.weight") for module in adapter.config.get("modules_to_save") or ())
        alone = name not in touched and (isinstance(head, Lora) or saved)
        check_still_tied(
            base, reader, name, {"embedding": rows(touched.get(name)), "head": rows(head)}, alone
        )


def _touched(
    adapter: Adapter, base: Checkpoint
) -> tuple[dict[str, Lora | str], list[tuple[str, Lora | str]]]:
    """Return for every tensor of the base that SFT changed the update, or the name of the tensor that replaces it.

    Returns:
        The updates by the base's names; and, with the embedding's name, those of a head that the base ties to it.

    Raises:
        ValueError: an update has another shape than the base's tensor, or a form that is not merged.
    """
    wanted = [*(f"{module}.weight" for module in adapter.loras), *adapter.whole]
    names = base_names(wanted, base)
    touched: dict[str, Lora | str] = {}
    heads: list[tuple[str, Lora | str]] = []
    for module, lora in adapter.loras.items():
        name = names[f"{module}.weight"]
        if "lora_B.bias" in lora.parts or (lora.dora and (lora.embedding or lora.transposed)):
            raise ValueError(
                f"The update of {module!r} has a bias or is a transposed DoRA: merge it with PEFT."
            )
        rows = adapter.files.entry(lora.stored("B")).shape[0]
        columns = adapter.files.entry(lora.stored("A")).shape[1]
        shape = (columns, rows) if lora.embedding or lora.transposed else (rows, columns)
        _check_shape(name, shape, base)
        if is_head(f"{module}.weight") and not is_head(name):
            heads.append((name, lora))
        else:
            touched[name] = lora
    for name, stored in adapter.whole.items():
        _check_shape(names[name], adapter.files.entry(stored).shape, base)
        if is_head(name) and not is_head(names[name]):
            heads.append((names[name], stored))
        else:
            touched[names[name]] = stored
    return touched, heads


def _check_shape(name: str, shape: tuple[int, ...], base: Checkpoint) -> None:
    if base.entry(name).shape != shape:
        raise ValueError(
            f"Expected the base's {name!r} to have the shape {shape} of the adapter's update but it has "
            f"{base.entry(name).shape}. Pass the base that the adapter was trained on; if SFT resized the "
            "vocabulary, merge with PEFT and pass the merged model."
        )


def _check_tokens(source: Path, base: Checkpoint) -> None:
    try:
        ids = token_ids(source)
    except CustomCode:  # its tokens are not known, but an embedding of another size is refused by its shape
        return
    rows = min((base.entry(name).shape[0] for name in embedding_names(base)), default=None)
    beyond = [token for token, number in (ids or {}).items() if rows is not None and number >= rows]
    if beyond:
        raise ValueError(
            f"The adapter's tokenizer has tokens {listing(beyond)} beyond the base's {rows} embedding rows: SFT "
            "resized the vocabulary. Merge with PEFT and pass the merged model."
        )
