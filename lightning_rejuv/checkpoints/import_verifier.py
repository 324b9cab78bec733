"""A verifier by its name, ``MODULE:FUNCTION``, found as ``python -m`` finds a module."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from types import ModuleType

from lightning_rejuv.checkpoints.rollouts import TextVerifier
from lightning_rejuv.names import listing


def import_verifier(name: str) -> TextVerifier:
    """Import ``module:function`` or ``module:Class.method``, from the working directory too.

    Raises:
        ValueError: the name is of another form, there is no such module, it raises something while it is imported, or
            it holds no such function. Whether that can be called is not looked at.

    >>> import_verifier("operator:eq")(1, 1)
    True
    >>> import_verifier("./my_module.py:right")
    Traceback (most recent call last):
    ...
    ValueError: Expected `verifier` as MODULE:FUNCTION ... but got the path of a file, './my_module.py': ...
    """
    module, _, function = name.partition(":")
    form = "Expected `verifier` as MODULE:FUNCTION (or MODULE:CLASS.METHOD) but got"
    if module.endswith(".py") or os.sep in module:
        raise ValueError(
            f"{form} the path of a file, {module!r}: name the module, without '.py', from the directory that it is in."
        )
    if not module or module.startswith(".") or not all(function.split(".")):
        raise ValueError(f"{form} {name!r}.")
    found = _import(module)
    try:
        return reduce(getattr, function.split("."), found)  # type: ignore[return-value]
    except AttributeError as error:
        there = [n for n, value in vars(found).items() if callable(value) and not n.startswith("_")]
        raise ValueError(
            f"Expected `verifier` {name!r} to name a function but the module {module!r} holds no {function!r}; it "
            f"holds {listing(there)}."
        ) from error


def _import(name: str) -> ModuleType:
    try:
        with _working_directory_first():
            return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise ValueError(
                f"Expected `verifier` to name a module but there is none of the name {missing!r}, neither installed "
                f"nor in the working directory {os.getcwd()!r}."
            ) from error
        raise ValueError(
            f"The module {name!r} of `verifier` raised {type(error).__name__} while it was imported: {error}."
        ) from error


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Have imports look into the working directory first, as ``python -m`` does; a console script's do not."""
    here = os.getcwd()
    if not {"", here}.isdisjoint(sys.path):
        yield
        return
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
