"""A PEFT LoRA adapter on disk: which tensors it holds, and what they do to which weight of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_rejuv.checkpoints.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    Checkpoint,
    PathLike,
    read_json,
    reading,
)
from lightning_rejuv.checkpoints.header import read_header
from lightning_rejuv.checkpoints.skeleton import skeleton
from lightning_rejuv.config import Options
from lightning_rejuv.names import listing
from lightning_rejuv.weights.adapters import check_config

_PREFIX = "base_model.model."
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.weight)?$"
)
# PEFT takes any regular expression, and some take for ever to match. Repeated groups, references and assertions are
# refused; groups and repetitions are few, so that the work stays small.
_SLOW = re.compile(r"\)[*+?{]|\\[1-9]|\(\?")
_MAX_PATTERN = 256  # characters, of a pattern and of a name that it is matched with
_MAX_CHOICES = 3
_MAX_ALPHA = 1e30
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
        """Whether it is an embedding's."""
        return "lora_embedding_A" in self.parts

    @property
    def dora(self) -> bool:
        """Whether rows of the result are rescaled to trained norms."""
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
    """Whether a directory holds a PEFT adapter instead of a model."""
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()


def check_given(alpha: Any) -> float | Mapping[str, float]:
    """Return an alpha as plain numbers.

    Raises:
        ValueError: it has to be searched for, or is out of range.
    """
    given = Options(alpha=alpha).alpha
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
        ValueError: it is not LoRA, or of a kind whose fusion with the base is not a scaled adapter.
    """
    root = Path(path).expanduser()
    config = read_json(root / ADAPTER_CONFIG)
    if not (root / ADAPTER).is_file():
        raise FileNotFoundError(
            f"Expected {ADAPTER} in {str(root)!r}: save the adapter as safetensors; pickled weights are "
            "never read."
        )
    check_config(config, f"the adapter {str(root)!r}")
    header = read_header(root / ADAPTER)
    place = {entry.name: (ADAPTER, entry) for entry in header.entries}
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    frozen: dict[str, str] = {}
    for name in place:
        if not name.startswith(_PREFIX):
            raise ValueError(
                f"Expected the tensors of {str(root)!r} to begin with {_PREFIX!r} but got {name!r}."
            )
        inner = name.removeprefix(_PREFIX)
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
    """Say of every update how the base stores its weight: one ``fan_in_fan_out`` stands for layers of both kinds."""
    try:
        model = skeleton(base.path)
    except (ImportError, ValueError):
        return adapter
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
        ValueError: there is nothing to pull back.
    """
    with reading(adapter.files, base or adapter.files) as (files, theirs):
        for lora in adapter.loras.values():
            first, second = (
                ("lora_embedding_A", "lora_embedding_B") if lora.embedding else ("lora_A", "lora_B")
            )
            product = all(bool(files.read(lora.parts[part]).any()) for part in (first, second))
            bias = "lora_B.bias" in lora.parts and bool(files.read(lora.parts["lora_B.bias"]).any())
            if product or bias or lora.dora:
                return
        for stored in adapter.whole.values():
            if stored not in replaced:
                return
            ours, other = files.tensor(stored), theirs.tensor(replaced[stored])
            if ours.shape != other.shape or bool((ours.double() != other.double()).any()):
                return
    raise ValueError(
        f"The adapter {str(adapter.files.path)!r} changes nothing: the SFT model equals its base in every parameter, "
        "so that there is nothing to pull back. Was it saved before it was trained?"
    )


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
    rank = a[0]
    alpha = _by_pattern(root, config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < _MAX_ALPHA:
        raise ValueError(
            f"Expected `lora_alpha` in {str(root)!r} to be a finite number but got {alpha!r:.200}."
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Lora(module, scale, parts, bool(config.get("fan_in_fan_out")))


def _by_pattern(root: Path, patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: a pattern matches the end of a module's name, from a dot on."""
    try:
        for pattern, value in (patterns or {}).items():
            _check_pattern(root, pattern, module)
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    except (AttributeError, re.error) as error:
        raise ValueError(
            f"Expected `alpha_pattern` in {str(root / ADAPTER_CONFIG)!r} to map regular expressions to numbers but got "
            f"{patterns!r:.200} ({error})."
        ) from error
    return default


def _check_pattern(root: Path, pattern: str, module: str) -> None:
    plain = pattern.replace("(?:", "(")
    choices = sum(plain.count(sign) for sign in "(*+?{")
    slow = bool(_SLOW.search(plain)) or choices > _MAX_CHOICES
    if len(pattern) > _MAX_PATTERN or slow or (choices and len(module) > _MAX_PATTERN):
        raise ValueError(
            f"Expected `alpha_pattern` in {str(root / ADAPTER_CONFIG)!r} to hold names, or regular expressions of at "
            f"most {_MAX_PATTERN} characters and {_MAX_CHOICES} groups and repetitions, none repeated, for names as "
            f"long, but got {pattern!r:.200} for {module!r:.200}: matching it may take for ever. Write the names out."
        )
