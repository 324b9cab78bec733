"""A PEFT LoRA adapter on disk: what its tensors do to which weight of the base, and its fusion with the base.

Adapter in, adapter out: the fusion is a scaled update, for which the base is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rejuv import __version__
from lightning_rejuv.adapters import check_config, scale_of
from lightning_rejuv.anchor.files import ADAPTER_CONFIG, read_json
from lightning_rejuv.anchor.header import build_header, read_header
from lightning_rejuv.checkpoints.models import skeleton_if_known
from lightning_rejuv.checkpoints.names import base_names
from lightning_rejuv.checkpoints.options import given_alpha
from lightning_rejuv.checkpoints.output import check_apart, check_free, new_directory, write_file
from lightning_rejuv.checkpoints.reader import Checkpoint, open_checkpoint, reading
from lightning_rejuv.checkpoints.record import a_second_time, find_record
from lightning_rejuv.checkpoints.report import CheckpointReport, write_report
from lightning_rejuv.checkpoints.sidecar import copy_sidecar, links_out
from lightning_rejuv.checkpoints.writer import FileWriter, Hasher
from lightning_rejuv.config import USUAL_ALPHA, Options, PathLike, alpha_by_name
from lightning_rejuv.names import PEFT_ROOT, listing
from lightning_rejuv.weights.edit import lerp_
from lightning_rejuv.weights.rounding import random_stream

ADAPTER = "adapter_model.safetensors"
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.weight)?$"
)
_UNKNOWN_PART = re.compile(r"\.(?:lora_|trainable_tokens|token_adapter|hada_|lokr_|vera_|oft_|ia3_)")


@dataclass(frozen=True)
class Lora:
    """The update of one weight: ``scale * B @ A``, for embeddings and Conv1D its transpose.

    Attributes:
        module: the module's name in the base model.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA.
        parts: the names of its tensors in the adapter's file, by part.
        transposed: whether the base stores the weight as [in, out] (transformers' Conv1D).
    """

    module: str
    scale: float
    parts: dict[str, str]
    transposed: bool = False

    @property
    def embedding(self) -> bool:
        """True for the update of an embedding."""
        return "lora_embedding_A" in self.parts

    def stored(self, matrix: str) -> str:
        """Return the name of ``"A"`` or ``"B"`` in the adapter's file."""
        return self.parts[("lora_embedding_" if self.embedding else "lora_") + matrix]

    @property
    def dora(self) -> bool:
        """True if rows of the result are rescaled to trained norms."""
        return "lora_magnitude_vector" in self.parts


@dataclass(frozen=True)
class Adapter:
    """An adapter directory.

    Attributes:
        files: its tensors.
        config: ``adapter_config.json``.
        loras: the updates, by module.
        whole: tensors that replace the base's (``modules_to_save``, trained biases): the base model's name,
            and the name in the file.
    """

    files: Checkpoint
    config: dict[str, Any]
    loras: dict[str, Lora]
    whole: dict[str, str]


def is_adapter(path: PathLike) -> bool:
    """Tell whether a directory holds a PEFT adapter instead of a model."""
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def check_given(alpha: Any) -> float | Mapping[str, float]:
    """Return an alpha as plain numbers.

    Raises:
        ValueError: the alpha has to be searched for, or is out of range.
    """
    given = Options(alpha=given_alpha(alpha)).alpha
    if isinstance(given, str):
        raise ValueError(
            f"Expected `alpha` to be a number, or one for each pattern of names, but got {given!r}: finding it needs a "
            "whole model. Merge the adapter first: `merge_adapter(base, sft, out, alpha=1)`."
        )
    return given


def open_adapter(path: PathLike) -> Adapter:
    """Read the headers of a LoRA adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the adapter is not LoRA, or of a kind whose fusion with the base is not a scaled adapter.
    """
    root = Path(path).expanduser()
    config = read_json(root / ADAPTER_CONFIG)
    if not (root / ADAPTER).is_file():
        raise FileNotFoundError(
            f"Expected {ADAPTER} in {str(root)!r}: save the adapter as safetensors; pickled weights are never read."
        )
    check_config(config, f"the adapter {str(root)!r}")
    header = read_header(root / ADAPTER)
    place = {entry.name: (ADAPTER, entry) for entry in header.entries}
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    frozen: dict[str, str] = {}
    for name in place:
        if not name.startswith(PEFT_ROOT):
            raise ValueError(
                f"Expected the tensors of {str(root)!r} to begin with {PEFT_ROOT!r} but got {name!r}."
            )
        inner = name.removeprefix(PEFT_ROOT)
        if found := _PART.match(inner):
            parts.setdefault(found["module"], {})[found["part"].removesuffix(".weight")] = name
        elif _UNKNOWN_PART.search(inner):
            raise ValueError(
                f"Expected a LoRA adapter in {str(root)!r} but its tensor {name!r} is not known."
            )
        elif ".base_layer." in inner:
            # A trained bias; or the frozen copy of the base's embedding that PEFT stores beside its update.
            frozen[inner.replace(".base_layer.", ".")] = name
        else:
            whole[re.sub(r"\.modules_to_save(?:\.default)?\.", ".", inner)] = name
    whole |= {n: stored for n, stored in frozen.items() if n.removesuffix(".weight") not in parts}
    loras = {module: _lora(root, module, found, config, place) for module, found in parts.items()}
    return Adapter(Checkpoint(root, {}, {ADAPTER: header}, place, None), config, loras, whole)


def for_base(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter with the way in which the base stores each weight.

    PEFT stores one ``fan_in_fan_out`` for layers of both kinds.
    """
    model = skeleton_if_known(base.path)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()} if model else {}
    loras = {
        module: replace(lora, transposed=kinds[module] == "Conv1D") if module in kinds else lora
        for module, lora in adapter.loras.items()
    }
    return replace(adapter, loras=loras)


def check_trained(adapter: Adapter, base: Checkpoint | None, replaced: dict[str, str]) -> None:
    """Refuse an adapter that changes nothing: every update is zero and every whole tensor is the base's.

    Args:
        adapter: the adapter.
        base: the base, for whole tensors.
        replaced: the base's names on disk of whole tensors, by their names in the adapter's file.

    Raises:
        ValueError: the adapter changes nothing, so that there is nothing to pull back.
    """
    with reading(adapter.files, base or adapter.files) as (files, base_reader):
        for lora in adapter.loras.values():
            product = all(bool(files.read(lora.stored(matrix)).any()) for matrix in "AB")
            bias = "lora_B.bias" in lora.parts and bool(files.read(lora.parts["lora_B.bias"]).any())
            if product or bias or lora.dora:
                return
        for stored in adapter.whole.values():
            if stored not in replaced:
                return
            tensor, base_tensor = files.tensor(stored), base_reader.tensor(replaced[stored])
            if tensor.shape != base_tensor.shape or bool((tensor.double() != base_tensor.double()).any()):
                return
    raise ValueError(
        f"The adapter {str(adapter.files.path)!r} changes nothing: the SFT model equals its base in every parameter, "
        "so that there is nothing to pull back. Was it saved before it was trained?"
    )


def rejuvenate_adapter(
    sft: PathLike,
    out: PathLike,
    *,
    base: PathLike | None = None,
    alpha: float | str | Mapping[str, float] = USUAL_ALPHA,
    hashes: bool = True,
) -> CheckpointReport:
    """Write the fusion of a LoRA-SFT model with its base, as an adapter for the same base.

    ``W + scale * B @ A`` moves to ``W + alpha * scale * B @ A``, so that only B changes, by ``alpha``; the
    same holds for rank-stabilised LoRA and for embeddings. Tensors that replace the base's
    (``modules_to_save``, trained biases) are interpolated with the base's, for which the base is read. In half types
    those are rounded stochastically, always in the same way, and B is rounded to nearest: its entries are many steps of
    the dtype away from zero, so that noise would gain nothing.

    Args:
        sft: directory of the adapter.
        out: directory to write; must not exist.
        base: directory of the base; needed only if the adapter replaces tensors.
        alpha: weight of the SFT model; or one for each pattern of weights' names in the base model, as a mapping or
            as a YAML file that holds one.
        hashes: see :func:`rejuvenate_checkpoint`.

    Raises:
        ValueError: DoRA, whose fusion is no DoRA of the same form (merge it instead); another kind of
            adapter that cannot be scaled; a tensor of the base is needed and not given.
        FileExistsError: the output exists.
    """
    given = check_given(alpha)
    source, target = Path(sft).expanduser(), Path(out).expanduser()
    check_free(target)
    check_apart(target, source, *([Path(base).expanduser()] if base else []))
    adapter, warnings = open_adapter(source), links_out(source)
    warnings += a_second_time(find_record(adapter.files, adapter.files)[0])
    dora = [module for module, lora in adapter.loras.items() if lora.dora]
    if dora:
        raise ValueError(
            f"The adapter {str(source)!r} is DoRA ({listing(dora)}): its fusion with the base is no adapter of the "
            "same form. Write the whole model with `merge_adapter`."
        )
    names = [*(f"{module}.weight" for module in adapter.loras), *adapter.whole]
    alphas = alpha_by_name(given, names)
    files, opened = adapter.files, open_checkpoint(base, "base") if base and adapter.whole else None
    replaced = _replaced(adapter, opened)
    check_trained(adapter, opened, {stored: name for stored, (_, name) in replaced.items()})
    factors = {
        lora.parts[part]: alphas[f"{lora.module}.weight"]
        for lora in adapter.loras.values()
        for part in ("lora_B", "lora_embedding_B", "lora_B.bias")
        if part in lora.parts
    }
    inputs = {"sft": (source, [ADAPTER])}
    if opened:
        inputs["base"] = opened.path, list(opened.shards)
    with new_directory(target) as partial, Hasher(partial, inputs, hashes=hashes) as hasher:
        with FileWriter(partial, hashes) as writer, reading(files, opened or files) as (reader, base_reader):
            entries = files.shards[ADAPTER].entries
            table = [(e.name, e.dtype, e.shape) for e in entries]
            writer.write(ADAPTER, build_header(table, files.shards[ADAPTER].metadata))
            for entry in entries:
                tensor = reader.tensor(entry.name)
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
            inputs=hasher.report(),
            outputs=writer.digests,
            options={"alpha": given, "reset": None, "hashes": hashes},
            alpha=given,
            warnings=tuple(warnings),
        )
        copy_sidecar(source, partial, None)
        write_file(partial / ADAPTER_CONFIG, (source / ADAPTER_CONFIG).read_bytes())
        write_report(partial, source, report)
    return report


def _lora(
    root: Path, module: str, parts: dict[str, str], config: dict[str, Any], place: dict[str, Any]
) -> Lora:
    first, second = (
        ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    )
    if first not in parts or second not in parts:
        raise ValueError(
            f"Expected both {first} and {second} of {module!r} in {str(root)!r} but got {listing(parts)}."
        )
    a, b = place[parts[first]][1].shape, place[parts[second]][1].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise ValueError(
            f"Expected matrices [r, in] and [out, r] for {module!r} in {str(root)!r} but got {a} and {b}."
        )
    scale = scale_of(config, module, a[0], repr(str(root / ADAPTER_CONFIG)))
    return Lora(module, scale, parts, bool(config.get("fan_in_fan_out")))


def _scaled(tensor: Tensor, alpha: float) -> Tensor:
    """Multiply in float32 or better and round once: a lerp toward the base's update, which is zero."""
    return lerp_(tensor, torch.zeros_like(tensor), 1.0 - alpha)


def _replaced(adapter: Adapter, base: Checkpoint | None) -> Mapping[str, tuple[str, str]]:
    """Return for each tensor that replaces the base's the model's name and the base's name on disk."""
    if not adapter.whole:
        return {}
    if base is None:
        raise ValueError(
            f"The adapter {str(adapter.files.path)!r} replaces whole tensors of the base ({listing(adapter.whole)}): "
            "they are interpolated with the base's, so pass `base`."
        )
    names = base_names(list(adapter.whole), base)
    for name, stored in adapter.whole.items():
        shape, base_shape = adapter.files.entry(stored).shape, base.entry(names[name]).shape
        if shape != base_shape:
            raise ValueError(
                f"Expected {stored!r} to have the base's shape {base_shape} but got {shape}. A resized vocabulary "
                "needs the whole model: merge the adapter with PEFT and pass the merged model."
            )
    return {stored: (name, names[name]) for name, stored in adapter.whole.items()}
