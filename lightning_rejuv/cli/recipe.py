"""Recipes in YAML: options of the command and their values, and never the name of code that would be imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonargparse

from lightning_rejuv.config import Refit, Reset

OBJECTS = {"reset": Reset, "refit": Refit}
SHOWN = ("json", "quiet", "traceback")  # how every command shows what it does
SWITCHES = ("merge", "no_hash", *SHOWN)


class WrongUsage(ValueError):
    """A command line or a recipe that cannot be meant."""


def flag(name: str) -> str:
    """Return the flag of an option.

    >>> flag("compute_dtype")
    '--compute-dtype'
    """
    return f"--{name.replace('_', '-')}"


def load_yaml(text: str) -> Any:
    """Read YAML that names values and no code: jsonargparse would import what a `class_path` names.

    Raises:
        ValueError: it is not YAML, names a class, or has an alias, of which a few make a file without end.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError(
                "Expected options and their values but got an alias (`*name`): write out the value."
            )
        content = jsonargparse.get_loader("yaml")(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"Expected YAML but got {' '.join(str(error).split())}.") from error
    if "class_path" in _keys(content):
        raise ValueError("Expected options and their values but got a `class_path`: no option is a class.")
    return content


def _keys(content: Any) -> set[str]:
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    own = set(map(str, content)) if isinstance(content, dict) else set()
    return own.union(*map(_keys, inside))


def flags_of(path: str, known: Mapping[str, bool]) -> Iterator[str]:
    """Yield the flags for which a recipe stands, each as ``--name=value``.

    Args:
        path: the recipe.
        known: the options of the command, and of each whether it is text alone.

    Raises:
        WrongUsage: it is not YAML, holds an option that the command does not have, or a value that no option has.
        OSError: it cannot be read.
    """
    try:
        content = load_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        error.strerror = f"{error.strerror}, for the recipe"
        raise
    except UnicodeDecodeError as error:
        raise WrongUsage(
            f"Expected the recipe {path!r} to be UTF-8 but its byte {error.start} is not ({error.reason})."
        ) from error
    except ValueError as error:
        raise WrongUsage(f"The recipe {path!r} cannot be read. {error}") from error
    if not isinstance(content, dict):
        raise WrongUsage(
            f"Expected the recipe {path!r} to hold options and their values, such as `alpha: 0.4`, but "
            + ("it is empty." if content is None else f"got {content!r:.200}.")
        )
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in SWITCHES and name in known:
            if not isinstance(value, bool):
                raise WrongUsage(f"Expected `{flag(name)}` to be true or false but got {value!r:.200}.")
            yield from [f"--{name}"] if value else []
        elif name in OBJECTS and name in known:
            yield from object_flags(name, value)
        elif name not in known:
            raise WrongUsage(
                f"The recipe {path!r} holds {str(key)!r:.100}, which is no option of this command. It may hold "
                f"{', '.join(sorted(n for n in known if '.' not in n))}."
            )
        elif value is not None:
            yield f"--{name}={_as_text(name, value, only_text=known[name])}"


def object_flags(name: str, value: Any) -> Iterator[str]:
    """Yield the flags for a reset or a refit that is said as a whole: null, or a mapping of some of its fields.

    Raises:
        WrongUsage: it is anything else.
    """
    held = [field.name for field in fields(OBJECTS[name])]
    if value is None:
        yield f"--{name}=null"
        return
    unknown = [key for key in value if key not in held] if isinstance(value, dict) else [value]
    if unknown:
        what = f"the field {unknown[0]!r:.200}" if isinstance(value, dict) else f"{value!r:.200}"
        raise WrongUsage(
            f"Expected `{flag(name)}` to be null or fields of `{OBJECTS[name].__name__}` ({', '.join(held)}) but got "
            f"{what}."
        )
    yield from [] if value else [f"--{name}={{}}"]
    for key, field in value.items():
        yield f"--{name}.{key}={_as_text(f'{name}.{key}', field, only_text=False)}"


def _as_text(name: str, value: Any, *, only_text: bool) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, str):
        if not value:
            raise WrongUsage(f"Expected `{flag(name)}` to have a value but got an empty text.")
        return value
    if isinstance(value, dict) and name == "alpha":
        return json.dumps(value)
    if only_text or isinstance(value, (dict, list)):
        what = "text" if only_text else "text or a number"
        raise WrongUsage(f"Expected `{flag(name)}` to be {what} but got {value!r:.200}.")
    return "null" if value is None else repr(value)
