"""What transformers makes of the tensors of a directory when it loads a model: new names, other layouts.

Experts that are stored one by one are one tensor in memory, the parts of a vision-language model stand under other
names, and so on. The rules are transformers' own; here they are applied to names, and to a tensor only when it is
asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import class_before_fsdp2, is_hugging_face, language_model
from lightning_rejuv.anchor.anchor import Anchor


@dataclass(frozen=True)
class Source:
    """Tensors on disk that become one tensor in memory, or several, together.

    Attributes:
        names: their names on disk, in the loader's order.
        target: the name of the first tensor in memory.
        patterns: for each name the pattern of the converter that takes it; empty if it is only renamed.
        converter: transformers' converter; None if the tensor is only renamed.
        model: a model of the architecture.
    """

    names: tuple[str, ...]
    target: str
    patterns: tuple[str, ...] = ()
    converter: Any = None
    model: Any = None

    def tensors(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the tensors in memory, by name.

        Args:
            read: gives a tensor on disk.

        Raises:
            ValueError: the tensors on disk do not fit together.
        """
        if self.converter is None:
            return {self.target: read(self.names[0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in zip(self.names, self.patterns, strict=True):
            converter.add_tensor(self.target, name, pattern, read(name))
        try:
            found = converter.convert(self.target, model=self.model, config=self.model.config)
        except Exception as error:  # whatever shapes that do not fit lead to
            raise ValueError(
                f"Expected {list(self.names[:4])} … to make up {self.target!r} but putting them together ended with: "
                f"{error}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def without_memory(model: nn.Module) -> nn.Module:
    """Build a transformers model again without memory for its weights, and without wrappers around its modules."""
    with torch.device("meta"):
        built: nn.Module = class_before_fsdp2(model)(copy.deepcopy(model.config))
    return built


def sources(model: nn.Module, names: Iterable[str]) -> list[Source]:
    """Find what transformers makes of names on disk when it loads a model; a name that it ignores stays as it is.

    Args:
        model: a transformers model that is not wrapped; its weights are not looked at.
        names: the names of all tensors on disk.
    """
    from transformers import conversion_mapping, core_model_loading

    # The types of transformers differ between releases, and what is used here is duck-typed.
    rules: list[Any] = list(conversion_mapping.get_model_conversion_mapping(model))
    renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    in_memory, prefix = model.state_dict(), str(model.base_model_prefix)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, in_memory)
        if target not in in_memory and name in in_memory:  # it is a name in memory already
            target, pattern = core_model_loading.rename_source_key(name, [], [], prefix, in_memory)
        if target not in in_memory:
            target, pattern = name, None
        found.setdefault(target, []).append((name, pattern))
    return [
        Source(
            tuple(name for name, _ in parts),
            target,
            tuple(str(pattern) for _, pattern in parts) if parts[0][1] is not None else (),
            by_pattern[parts[0][1]] if parts[0][1] is not None else None,
            model,
        )
        for target, parts in found.items()
    ]


def architecture(model: nn.Module) -> tuple[str, str] | None:
    """Return what tells the architecture of a transformers model in a module: class and config; None without one."""
    inner = language_model(model)
    if not is_hugging_face(inner):
        return None
    config: Any = inner.config
    return type(inner).__name__, str(config.to_json_string())


def as_loaded(anchor: Anchor, model: nn.Module) -> Anchor:
    """Return an anchor on disk with the names and layouts that its tensors have once transformers has loaded them.

    Args:
        anchor: the tensors of a directory, by their names on disk.
        model: the model to be matched: a transformers model, or a module around one.

    Returns:
        The anchor itself if transformers has nothing to convert, or does not know the model.
    """
    inner = language_model(model)
    if not is_hugging_face(inner):
        return anchor
    try:
        skeleton = without_memory(inner)
    except Exception:  # a model of the user's own class, built from more than a config
        return anchor
    found = sources(skeleton, anchor.names())
    if all(source.converter is None and source.names == (source.target,) for source in found):
        return anchor
    return _Loaded(anchor, found)


class _Loaded(Anchor):
    """Tensors in memory, each put together from its parts on disk when it is asked for."""

    def __init__(self, anchor: Anchor, found: list[Source]) -> None:
        self._anchor = anchor
        self._source: dict[str, Source] = {}
        self._shapes: dict[str, torch.Size] = {}
        for source in found:
            for name, tensor in source.tensors(self._without_memory).items():
                self._source[name], self._shapes[name] = source, tensor.shape
        self._held: tuple[Source | None, Mapping[str, Tensor]] = (None, {})

    def _without_memory(self, name: str) -> Tensor:
        return torch.empty(self._anchor.shape(name), device="meta")

    @property
    def description(self) -> str:
        return self._anchor.description

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self._anchor.config

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._anchor.end_tokens

    def names(self) -> list[str]:
        return list(self._source)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype | None:
        return self._anchor.dtype(self._source[name].names[0])

    def tensor(self, name: str) -> Tensor:
        source = self._source[name]
        if self._held[0] is source:
            return self._held[1][name]
        found = source.tensors(self._anchor.tensor)
        # If several tensors come from the same parts, the others are asked for next.
        self._held = (source, found) if len(found) > 1 else (None, {})
        return found[name]
