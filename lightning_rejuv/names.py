"""Parameter names across wrappers: the one place where prefixes are stripped."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

# Inserted by torch.compile, FSDP1 and activation checkpointing around a module that the user named.
_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Inserted by PEFT: around the model, around an adapted layer, around a module that is trained as a whole.
PEFT_ROOT = "base_model.model."
_PEFT_PARTS = re.compile(r"\.(?:base_layer|original_module)(?=\.)")
_PEFT_OWN = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+|token_adapter)\.")
_MAX_LISTED = 8
_MAX_LINE = 4000


def canonical_name(name: str) -> str:
    """Return a parameter's name without the parts that wrappers put into it.

    >>> canonical_name("_orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight")
    'layers.0.mlp.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def base_name(name: str) -> str | None:
    """Return the name that the base has for a parameter of a model with adapters (PEFT).

    Args:
        name: the parameter's name in the model, under any wrapper.

    Returns:
        The name in the base; None for what belongs to the adapter alone.

    >>> base_name("base_model.model.model.layers.0.q_proj.base_layer.weight")
    'model.layers.0.q_proj.weight'
    >>> base_name("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    """
    plain = canonical_name(name)
    if _PEFT_OWN.search(plain):
        return None
    before, root, after = plain.partition(PEFT_ROOT)
    return _PEFT_PARTS.sub("", before + after if root else plain)


def listing(names: Iterable[str]) -> str:
    """Format names for an error message: sorted, at most eight, with the rest counted and very long ones cut short.

    >>> listing(["b", "a"])
    "['a', 'b']"
    """
    ordered = sorted(names)
    shown = ", ".join(f"{name!r:.200}" for name in ordered[:_MAX_LISTED])
    rest = len(ordered) - _MAX_LISTED
    return f"[{shown}]" if rest <= 0 else f"[{shown}, … and {rest} more]"


def printable(text: str) -> str:
    r"""Return text of an untrusted file so that it is safe to print to a terminal.

    Characters that cannot be printed are escaped as ``repr`` escapes them: control characters, which could clear the
    terminal or forge what stands on it, and those that turn the direction of the text. Long lines are cut.

    >>> printable("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'
    """
    return "\n".join(map(_printable_line, text.split("\n")))


def _printable_line(line: str) -> str:
    cut = (
        line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}… and {len(line) - _MAX_LINE} characters more"
    )
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


@dataclass(frozen=True)
class Rename:
    """A renaming of all names alike: one prefix removed, or one added.

    Attributes:
        added: the prefix that every name gets.
        removed: the prefix that every name loses if it has it.
    """

    added: str = ""
    removed: str = ""

    def __call__(self, name: str) -> str:
        """Return the new name."""
        return self.added + name.removeprefix(self.removed)


def bridges(wanted: Sequence[Sequence[str]], available: Collection[str]) -> list[Rename]:
    """Find how a model's names become the names under which a checkpoint holds the same tensors.

    A Lightning checkpoint names a module's weights ``model.…`` after the attribute that holds it; a
    LightningModule's own names have that prefix while the base's do not. One prefix, added or removed,
    has to fit *every* parameter, so that nothing is matched by accident.

    Args:
        wanted: for each parameter its canonical names: one, or several if it is tied.
        available: the checkpoint's canonical names.

    Returns:
        Every renaming that fits, the shortest prefix first: several if a checkpoint holds several models.

    >>> [rename] = bridges([["a.weight"], ["b.weight"]], {"net.a.weight", "net.b.weight", "loss.scale"})
    >>> rename("a.weight")
    'net.a.weight'
    """
    if not wanted:
        return []
    added, removed = {""}, set[str]()
    for alias in wanted[0]:
        added.update(name.removesuffix(alias) for name in available if name.endswith("." + alias))
        removed.update(alias[: i + 1] for i, letter in enumerate(alias) if letter == ".")
    candidates = [Rename(added=prefix) for prefix in sorted(added, key=lambda p: (len(p), p))]
    # A prefix that one parameter of several has is that parameter's own name, not a root.
    roots = [p for p in removed if sum(_has(aliases, p) for aliases in wanted) >= min(2, len(wanted))]
    candidates += [Rename(removed=prefix) for prefix in sorted(roots, key=len)]
    return [
        rename
        for rename in candidates
        if all(any(rename(alias) in available for alias in aliases) for aliases in wanted)
    ]


def _has(aliases: Sequence[str], prefix: str) -> bool:
    return any(alias.startswith(prefix) for alias in aliases)


def bridge(wanted: Sequence[Sequence[str]], available: Collection[str]) -> Rename | None:
    """Return the first of :func:`bridges`, or None if no single prefix fits."""
    return next(iter(bridges(wanted, available)), None)
