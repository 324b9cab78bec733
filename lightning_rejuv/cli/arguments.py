"""What a command line asks for: its own options, and those of its recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from lightning_rejuv.cli.parser import COMMANDS, USAGE, build_parser, defaults_of, help_of, known_options
from lightning_rejuv.cli.recipe import (
    OBJECTS,
    SHOWN,
    SWITCHES,
    WrongUsage,
    flag,
    flags_of,
    load_yaml,
    object_flags,
)

_WITHOUT_VALUE = (*SWITCHES, "help", "version", "print_config", "reset.help", "refit.help")


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


class _Written(NamedTuple):
    """An argument as it was written: an option with its value, or anything else without a name."""

    name: str
    text: str


def parse(arguments: Sequence[str] | None = None) -> Parsed:
    """Read the command line.

    Raises:
        SystemExit: after help, the version or the configuration (0), and if the usage is wrong or there is no
            command (2).
        OSError: a recipe cannot be read.
    """
    written = list(sys.argv[1:] if arguments is None else arguments)
    command, known, parser = written[0] if written else "", {}, build_parser()
    if command in COMMANDS or command == "verify":
        parser.command, known = command, known_options(command)
    try:
        options = list(_options(written[1:]))
        _check_known(options, parser.command, known)
        recipes = [flag for name, path in options if name == "config" for flag in flags_of(path, known)]
        flags = [(option, list(_flags(option, known))) for option in options if option.name != "config"]
        _check_agreement(flags)
        held = [flag for text in recipes for flag in _flags(_as_written(text), known)]
    except WrongUsage as error:
        parser.error(str(error))
    for name in OBJECTS:
        if any(option.name == f"{name}.help" for option in options):
            print(help_of(name), end="")
            parser.exit()
    typed = {name.partition(".")[0] for name, _ in options}
    # Of two values the later one counts.
    given = [*written[:1], *held, *(flag for _, found in flags for flag in found)]
    namespace = parser.parse_args(given, defaults="print_config" in typed)
    if (command := namespace.get("command")) is None:
        parser.print_help()
        parser.exit(USAGE)
    found = namespace[command].as_dict()
    for name in ("config", "no_hash"):  # other options stand for them
        found.pop(name, None)
    shown = {name: found.pop(name, False) for name in SHOWN}
    # What a recipe says in full, `--print_config` prints every default, is not asked for; but for alpha, which is not
    # searched for an adapter.
    if any(flag.startswith("--alpha=") for flag in recipes):
        typed.add("alpha")
    usual = defaults_of(command)
    asked = {
        name: value
        for name, value in found.items()
        if value is not None and (name in typed or value != usual.get(name, False))
    }
    return Parsed(command, asked, **shown)


def made(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the functions take them: with a `Reset` and a `Refit` made of their fields.

    Raises:
        ValueError: a field is out of range.

    >>> made({"reset": {"scope": "layer"}})["reset"].scope
    'layer'
    """
    found = dict(options)
    for name, kind in OBJECTS.items():
        if found.get(name) is not None:
            found[name] = kind(**found[name])
    return found


def _options(arguments: Sequence[str]) -> Iterator[_Written]:
    """Yield options with their values; flags may be written with dashes or underscores.

    >>> list(_options(["--compute-dtype", "float32", "--quiet", "more"]))
    [_Written(name='compute_dtype', text='float32'), _Written(name='quiet', text=''), _Written(name='', text='more')]

    Raises:
        WrongUsage: an option has no value, or an empty one.
    """
    rest = iter(arguments)
    for argument in rest:
        option = _as_written(argument)
        if not option.name or option.name.partition("=")[0] in _WITHOUT_VALUE:
            yield option
            continue
        text = option.text if "=" in argument else next(rest, "")
        if not text or text.startswith("--"):
            raise WrongUsage(f"Expected `{flag(option.name)}` to have a value but got none.")
        yield option._replace(text=text)


def _as_written(argument: str) -> _Written:
    if not argument.startswith("--") or argument == "--":
        return _Written("", argument)
    name, _, text = argument[2:].partition("=")
    return _Written(name.replace("-", "_"), text)


def _flags(option: _Written, known: Mapping[str, bool]) -> Iterator[str]:
    """Yield the flags for which an option stands, as ``--name=value``.

    Raises:
        WrongUsage: a reset or a refit is neither null nor made of its fields.
    """
    name, text = option
    if not name:
        yield text
    elif name in OBJECTS and name in known:
        try:
            value = load_yaml(text)
        except ValueError:
            value = text
        yield from object_flags(name, value)
    elif (
        (held := name.partition(".")[0]) in OBJECTS and held in known and name not in (*known, f"{held}.help")
    ):
        yield from object_flags(held, {name.partition(".")[2]: text})  # which refuses it by name
    elif name == "reset_fraction" and name in known and (fraction := _number(text)) is not None:
        yield f"--reset.fraction={text}" if fraction else "--reset=null"
    elif name == "no_hash" and name in known and not text:
        yield "--hashes=false"
    else:
        yield f"--{name}={text}" if text else f"--{name}"


def _check_known(options: Sequence[_Written], command: str, known: Mapping[str, bool]) -> None:
    """Refuse what is no option, abbreviations too, which could mean another one tomorrow.

    Raises:
        WrongUsage: with the option that may have been meant.
    """
    names = [*known, *_WITHOUT_VALUE, "config"]
    for name, _ in options if command else ():
        if (
            name
            and name not in names
            and name.partition(".")[0] not in {*OBJECTS, *_WITHOUT_VALUE} & {*names}
        ):
            near = get_close_matches(name, known, 1, 0.5)
            meant = f" Did you mean `{flag(near[0])}`?" if near else ""
            raise WrongUsage(f"`{flag(name)}` is no option of `lightning-rejuv {command}`.{meant}")


def _number(text: str) -> float | None:
    """Return a finite number; None for anything else, which jsonargparse refuses."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if abs(found) < float("inf") else None


def _check_agreement(flags: Sequence[tuple[_Written, list[str]]]) -> None:
    """Refuse fields of a reset or a refit beside null.

    Raises:
        WrongUsage: with the option that would have no effect.
    """
    for name in OBJECTS:
        none = [option for option, found in flags if found == [f"--{name}=null"]]
        idle = [option for option, found in flags if any(text.startswith(f"--{name}.") for text in found)]
        if none and idle:
            raise WrongUsage(
                f"Expected no `{flag(idle[0].name)}` beside `{flag(none[0].name)} {none[0].text}`: it would have no "
                "effect. Leave one of them out."
            )
