"""Parameter names across wrappers: the one place where prefixes are stripped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

# Inserted by torch.compile, FSDP1 and activation checkpointing around a module that the user named.
_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MAX_LISTED = 8


def canonical_name(name: str) -> str:
    """Return a parameter's name without the parts that wrappers put into it.

    >>> canonical_name("_orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight")
    'layers.0.mlp.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def listing(names: Iterable[str]) -> str:
    """Format names for an error message: sorted, at most eight, the rest counted; very long ones cut short.

    >>> listing(["b", "a"])
    "['a', 'b']"
    """
    ordered = sorted(names)
    shown = ", ".join(f"{name!r:.200}" for name in ordered[:_MAX_LISTED])
    rest = len(ordered) - _MAX_LISTED
    return f"[{shown}]" if rest <= 0 else f"[{shown}, … and {rest} more]"


def bridge(wanted: Sequence[Sequence[str]], available: Collection[str]) -> Callable[[str], str] | None:
    """Find how a model's names become the names under which a checkpoint holds the same tensors.

    A Lightning checkpoint names a module's weights ``model.…`` after the attribute that holds it; a
    LightningModule's own names have that prefix where the base's do not. One prefix, added or removed,
    has to fit *every* parameter, so that nothing is matched by accident.

    Args:
        wanted: for each parameter its canonical names: one, or several where it is tied.
        available: the checkpoint's canonical names.

    Returns:
        The renaming, or None where no single prefix fits.

    >>> rename = bridge([["a.weight"], ["b.weight"]], {"net.a.weight", "net.b.weight", "loss.scale"})
    >>> rename("a.weight")
    'net.a.weight'
    """
    if not wanted:
        return None
    added, removed = {""}, set[str]()
    for alias in wanted[0]:
        added.update(name.removesuffix(alias) for name in available if name.endswith("." + alias))
        removed.update(alias[: i + 1] for i, letter in enumerate(alias) if letter == ".")
    candidates = [_adds(prefix) for prefix in sorted(added, key=len)]
    candidates += [_removes(prefix) for prefix in sorted(removed, key=len)]
    for rename in candidates:
        if all(any(rename(alias) in available for alias in aliases) for aliases in wanted):
            return rename
    return None


def _adds(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def _removes(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)
