"""What a command line asks for: its own options, and those of its recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rejuv.cli.parser import OBJECTS, SWITCHES, USAGE, build_parser, defaults_of, flag


@dataclass(frozen=True)
class Parsed:
    """A command line that was read.

    Attributes:
        command: "diagnose", "rejuvenate" or "verify".
        given: the options that were given, on the command line or in a recipe; of all others the functions know the
            defaults.
        json: whether the report is printed as JSON.
        quiet: whether there is no progress bar, and no report but ``json``.
        traceback: whether the traceback of an error is printed, too.
    """

    command: str
    given: dict[str, Any]
    json: bool = False
    quiet: bool = False
    traceback: bool = False


def parse(arguments: Sequence[str] | None = None) -> Parsed:
    """Read the command line.

    Raises:
        SystemExit: after help, the version or the configuration (0), and if the usage is wrong or there is no
            command (2).
    """
    given = [_with_underscores(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    parser = build_parser()
    prints = any(argument.partition("=")[0] == "--print_config" for argument in given)
    try:
        namespace = parser.parse_args(_recipes_first(given), defaults=prints)
    except UnicodeDecodeError as error:
        parser.error(f"Expected the recipe to be UTF-8 but its byte {error.start} is not ({error.reason}).")
    if (command := namespace.get("command")) is None:
        parser.print_help()
        parser.exit(USAGE)
    options = namespace[command].as_dict()
    for name in SWITCHES:
        if type(options.get(name, False)) is not bool:
            parser.error(f"Expected `{flag(name)}` to be true or false but got {options[name]!r:.200}.")
    shown = {name: options.pop(name, False) for name in ("json", "quiet", "traceback")}
    # What a recipe says in full, `--print_config` prints every default, is not asked for.
    typed = {argument.partition("=")[0].lstrip("-").partition(".")[0] for argument in given}
    usual = defaults_of(command)
    asked = {
        n: v
        for n, v in options.items()
        if v is not None and v is not False and (n in typed or v != usual.get(n))
    }
    asked.pop("config", None)
    return Parsed(command, asked, **shown)


def made(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the functions take them: with a `Reset` and a `Refit` made of their fields.

    Raises:
        ValueError: a field is out of range.

    >>> made({"reset": {"scope": "layer"}, "reset_fraction": 0.1})["reset"].fraction
    0.1
    """
    found = dict(options)
    if (fraction := found.pop("reset_fraction", None)) is not None:
        found["reset"] = {**(found.get("reset") or {}), "fraction": fraction} if fraction else None
    for name, kind in OBJECTS.items():
        if found.get(name) is not None:
            found[name] = kind(**found[name])
    return found


def _with_underscores(argument: str) -> str:
    """Return a flag as Python's parameters are written: ``--compute-dtype`` is ``--compute_dtype``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _recipes_first(given: Sequence[str]) -> list[str]:
    """Return a command's arguments with its recipes before the options: of two values the later one counts.

    >>> _recipes_first(["diagnose", "--sft", "a", "--config", "recipe.yaml"])
    ['diagnose', '--config', 'recipe.yaml', '--sft', 'a']
    """
    command, recipes, others = list(given[:1]), list[str](), list[str]()
    rest = iter(given[1:])
    for argument in rest:
        if argument == "--config":
            recipes += [argument, *([value] if (value := next(rest, None)) is not None else [])]
        else:
            (recipes if argument.startswith("--config=") else others).append(argument)
    return command + recipes + others
