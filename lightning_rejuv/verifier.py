"""A caller's verifier: how it is imported, checked and called, and how its answers are read."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from types import ModuleType
from typing import Any

import torch

from lightning_rejuv.names import listing

_SHOWN = 200
# Names of arguments that stand for the true answer, which no verifier is given.
_TRUTH = {"ground_truth", "gold", "label", "labels", "reference"}


def check_verifier(verifier: Any, given: Sequence[str]) -> None:
    """Refuse, before anything is computed, a verifier that cannot be called as it will be.

    Args:
        verifier: what the caller brought.
        given: the names of what it is called with, in order.

    Raises:
        ValueError: it cannot be called, it is a coroutine function, its signature does not take so many arguments, or
            names one of them as another, or as the true answer.

    >>> check_verifier(lambda response: True, ("prompt", "response"))
    Traceback (most recent call last):
    ...
    ValueError: Expected `verifier` to take (prompt, response) but <lambda>(response) does not: too many positional ...
    """
    takes = f"({', '.join(given)})"
    if not callable(verifier):
        raise ValueError(
            f"Expected `verifier` to be a function of {takes} but got {verifier!r:.{_SHOWN}} "
            f"({_kind(verifier)})."
        )
    name = getattr(verifier, "__qualname__", type(verifier).__qualname__)
    if any(map(inspect.iscoroutinefunction, (verifier, type(verifier).__call__))):
        raise ValueError(
            f"Expected `verifier` to be a plain function but {name} is a coroutine function (`async def`), whose "
            "answer nobody awaits. Pass one that runs it (`asyncio.run`)."
        )
    try:
        signature = inspect.signature(verifier)
    except (TypeError, ValueError):  # some functions in C have no signature
        return
    wrap = f"Wrap it in a function of {takes} that knows what else it needs: the true answer to each prompt, say."
    try:
        bound = signature.bind(*given).arguments
    except TypeError as error:
        raise ValueError(
            f"Expected `verifier` to take {takes} but {name}{signature} does not: {error}. {wrap}"
        ) from error
    for parameter, value in bound.items():
        if parameter != value and parameter in _TRUTH.union(given):
            raise ValueError(
                f"Expected `verifier` to take {takes}, in this order, but {name}{signature} calls the {value} "
                f"`{parameter}`. {wrap}"
            )


def import_verifier(name: str) -> Callable[..., Any]:
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
        functions = [n for n, value in vars(found).items() if callable(value) and not n.startswith("_")]
        raise ValueError(
            f"Expected `verifier` {name!r} to name a function but the module {module!r} holds no {function!r}; it "
            f"holds {listing(functions)}."
        ) from error


def ask(verifier: Callable[..., Any], *given: Any, about: str) -> Any:
    """Return what a verifier answers; an exception that it raises is reported with what it was asked.

    Args:
        verifier: the caller's.
        given: its arguments.
        about: the arguments in words.

    Raises:
        RuntimeError: it raised an exception, which is the cause.

    >>> ask(lambda text: 1 / 0, "x", about="response 'x'")
    Traceback (most recent call last):
    ...
    RuntimeError: The verifier raised ZeroDivisionError on response 'x': division by zero.
    """
    try:
        return verifier(*given)
    except Exception as error:
        raise RuntimeError(f"The verifier raised {type(error).__name__} on {about}: {error}.") from error


def is_right(answer: Any, about: str) -> bool:
    """Read a verifier's answer about one response: a bool, or one of the numbers 0 and 1.

    It may be of any kind, also a tensor or an array of one element. Nothing else is taken for its truth: a reward of
    -1 for a wrong response, NaN and the text "False" are true for Python.

    Args:
        answer: what the verifier returned.
        about: the response in words.

    Raises:
        ValueError: the answer is neither.

    >>> is_right(1.0, "a response"), is_right(torch.tensor([False]), "a response")
    (True, False)
    >>> is_right(-1.0, "response 'x'")
    Traceback (most recent call last):
    ...
    ValueError: Expected the verifier to answer with a bool, or with 0 or 1, but got -1.0 (float) on response 'x'. ...
    """
    value = answer
    if hasattr(answer, "item") and math.prod(getattr(answer, "shape", (0,))) == 1:
        value = answer.item()
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError(
        f"Expected the verifier to answer with a bool, or with 0 or 1, but got {answer!r:.{_SHOWN}} "
        f"({_kind(answer)}) on {about}. Compare a score with the one from which a response is right."
    )


def are_right(answers: Any, rows: int, where: str) -> list[bool]:
    """Read a verifier's answer about a batch: for each row what :func:`is_right` takes.

    Args:
        answers: what the verifier returned: a tensor, an array or a list.
        rows: how many rows the batch has.
        where: how messages name the batch.

    Raises:
        ValueError: there is not one answer for each row, or one is neither 0 nor 1.

    >>> are_right([True, 0.0], 2, "sampled batch 0")
    [True, False]
    """
    expected = f"Expected the verifier to return one bool for each of the {rows} rows of {where} but got"
    try:
        found = torch.as_tensor(answers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{expected} {answers!r:.{_SHOWN}} ({_kind(answers)}).") from error
    if found.shape != (rows,):
        raise ValueError(f"{expected} shape {tuple(found.shape)}.")
    return [is_right(answer, f"row {row} of {where}") for row, answer in enumerate(found.tolist())]


def _kind(value: Any) -> str:
    return type(value).__name__


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
    """Have imports look into the working directory first, as under ``python -m``; in a console script they do not."""
    directory = os.getcwd()
    if not {"", directory}.isdisjoint(sys.path):
        yield
        return
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(directory)
