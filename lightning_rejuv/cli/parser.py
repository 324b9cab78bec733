"""The parsers of the command ``lightning-rejuv``, which jsonargparse makes from the functions in Python.

This module needs no torch, so that help is printed at once.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from types import FunctionType
from typing import Any, NoReturn, get_args, get_type_hints

import jsonargparse
from typing_extensions import override

from lightning_rejuv.checkpoints import commands
from lightning_rejuv.cli.recipe import OBJECTS, SHOWN, flag, load_yaml
from lightning_rejuv.names import printable

USAGE = 2
_LONGEST = 800  # characters of an error

COMMANDS: dict[str, Callable[..., Any]] = {
    "diagnose": commands.diagnose,
    "rejuvenate": commands.rejuvenate_checkpoint,
}

_DESCRIPTION = """\
Restore the plasticity of an over-trained language model between SFT and RL.

SFT that runs too long leaves a model that RL hardly improves: it is far from its base and sure of every token.
Rejuvenation (arXiv 2606.09932) writes

    alpha * SFT model + (1 - alpha) * base

and, if asked to, returns the neurons that push hardest on over-confident tokens to the base. The output is an ordinary
Hugging Face directory with the SFT model's tokenizer, chat template and generation config; any RL trainer
starts from it."""

_EPILOG = """\
typical use:
  lightning-rejuv diagnose   --base Qwen3-4B-Base --sft runs/sft --calibration sft.jsonl
  lightning-rejuv rejuvenate --base Qwen3-4B-Base --sft runs/sft --out runs/start --calibration sft.jsonl
  lightning-rejuv verify     runs/start

exit codes: 0 done; 1 verify found a fault; 2 wrong usage (no command, or a device that is not there, is wrong, too);
3 the input was refused or the computation failed, nothing is left under the output's name; 4 reading or writing
failed (no such file, disk full), nothing is left under the output's name; 130 interrupted, 143 terminated, 129
hung up. An error is one line on standard error; `--traceback` prints where it comes from, too."""

_DIAGNOSE = """\
how far SFT has gone, whether it went too far, and which alpha fits

Without calibration data only files are read: drift of every tensor from the base, what rounding would take
from a fusion, tying, vocabulary, chat template and EOS. With calibration data both models are run: token entropy
and likelihood of the same responses, whether the model still writes the format that they share, what the base samples
itself, and a search for alpha between the two. A verifier makes the verdict much surer."""

_REJUVENATE = """\
write a checkpoint that RL can start from

The output appears whole under its name, or not at all; inputs are never written to. Fusion by a number
(`--alpha 0.4`) reads and writes files in pieces and needs no calibration data and next to no
memory. If `--sft` is a LoRA adapter, so is the output: its update is scaled, by 0.4 if `--alpha` is not given,
and the base is not even read. An option that would have no effect is refused by name.

A reset and a refit are asked for by any of their fields (`--reset.fraction 0.02 --reset.scope layer`), which
`--reset.help` and `--refit.help` list; `--reset null` is fusion alone.

A recipe in YAML (`--config recipe.yaml`) holds any of the options; those beside it on the command line come first.
The recipe that was run is written to the output as rejuvenation.yaml; `--print_config` prints it and does nothing."""

_VERIFY = """\
is a checkpoint directory whole and loadable?

Index, headers, shapes, dtypes, NaN, tying, vocabulary, tokenizer, chat template, EOS and generation config; if
it was written by this command and with hashes, also that its files are what was written. Exit code 1 if there is a
fault."""

# What one of several types would have to be, as jsonargparse says it.
_TYPE_ERROR = re.compile(r"Expected an? (?P<type>.*?)(?:\. Got value: (?P<got>.*))?$", re.MULTILINE)
_KEY = re.compile(r'Parser key "(?P<key>[^"]*)"')
_YAML = "yaml of values"


class _Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Help as it was written, in plain text: docstrings mark code in backticks, and name parameters as Python does."""

    @override
    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("``", "").rstrip(".")
        if action.required and action.option_strings:
            return f"{text} (required)"
        unsaid = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        said = unsaid or "default" in text
        return text if said else f"{text} (default: %(default)s)"

    @override
    def format_help(self) -> str:
        return re.sub(
            r"(?<!\w)--(?!print_config)[\w.]+", lambda name: name[0].replace("_", "-"), super().format_help()
        )


class _Parser(jsonargparse.ArgumentParser):
    command = ""  # that was asked for

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line; the parsers of Python and jsonargparse print the whole usage before it."""
        if not self.exit_on_error:  # a parser inside, whose errors are told by the one outside
            super().error(message, ex)
        prog = f"lightning-rejuv {self.command}".strip()
        text = printable(_in_one_line(message))
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
        self.exit(USAGE, f"{prog}: error: {text} (`{prog} --help` lists the options)\n")


def _in_one_line(message: str) -> str:
    r"""Return an error of jsonargparse in one line; of a value that fits none of several types, what was expected.

    >>> print(_in_one_line("Parser key \"seed\":\\n  Expected a <class 'int'>. Got value: x"))
    Expected `--seed` to be int but got 'x'.
    """
    keys, expected = _KEY.findall(message), _TYPE_ERROR.findall(message)
    wrong = [(kind, got) for kind, got in expected if "NoneType" not in kind]
    if keys and wrong:
        kind, got = wrong[-1]
        kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind).replace("typing.Literal", "one of ")
        got = got or message.rpartition("Given value: ")[2].partition("\n")[0]
        return f"Expected `{flag('.'.join(dict.fromkeys(keys)))}` to be {kind} but got {got!r}."
    return " ".join(re.sub(r"(?:diagnose|rejuvenate|verify)\.(\w)", r"--\1", message).split()).replace(
        "required: --path", "required: DIR"
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # The version is looked up only if it is asked for.
        from lightning_rejuv import __version__

        print(f"lightning-rejuv {__version__}")
        parser.exit()


jsonargparse.set_loader(_YAML, load_yaml, exceptions=(ValueError,))


def build_parser() -> _Parser:
    """Return the parser of the command and of its subcommands."""
    parser = _Parser(
        prog="lightning-rejuv",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_Formatter,
        parser_mode=_YAML,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND", required=False)
    for name, text in (("diagnose", _DIAGNOSE), ("rejuvenate", _REJUVENATE), ("verify", _VERIFY)):
        command = _command(name, text)
        subcommands.add_subcommand(name, command, help=text.partition("\n")[0])
        command.prog = f"lightning-rejuv {name}"
    return parser


def help_of(name: str) -> str:
    """Return the help for the fields of a reset or a refit."""
    parser = _Parser(prog="lightning-rejuv rejuvenate", formatter_class=_Formatter, add_help=False)
    parser.add_class_arguments(OBJECTS[name], name)
    whole = next(action for action in parser._actions if action.dest == name)
    whole.help = argparse.SUPPRESS  # the object as a file, which the command does not take
    return parser.format_help()


def _command(name: str, text: str) -> _Parser:
    command = _Parser(description=text, formatter_class=_Formatter, parser_mode=_YAML)
    command.command = name
    if name == "verify":
        command.add_argument("path", metavar="DIR", help="the directory")
    else:
        command.add_argument("--config", action="config", metavar="RECIPE.yaml", help="options in YAML")
    if name == "diagnose":
        command.add_function_arguments(_without_result(commands.diagnose), as_group=False, skip={"progress"})
    if name == "rejuvenate":
        # An adapter needs no base.
        command.add_argument(
            "--base", type=str, help="directory of the checkpoint that SFT started from, or of an early one"
        )
        command.add_function_arguments(
            _without_result(commands.rejuvenate_checkpoint), as_group=False, skip={"base", "progress"}
        )
        command.add_argument(
            "--reset_fraction", type=float, metavar="F", help="short for --reset.fraction F; 0 for no reset"
        )
        command.add_argument("--no_hash", action="store_true", help="short for --hashes false")
        command.add_argument("--merge", action="store_true", help="with an adapter: write the whole model")
        sft = next(action for action in command._actions if action.dest == "sft")
        sft.help = "directory of the SFT model, or of a LoRA adapter (PEFT)"
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress bar, and no report but `--json`")
    command.add_argument("--traceback", action="store_true", help="print the traceback of an error, too")
    return command


def _without_result(function: Any) -> Any:
    """Return a function of the same parameters, paths as text, that does not say what it returns.

    To know that jsonargparse would import what the module imports for type checkers alone, and torch with it; and of
    an `os.PathLike` it would take any value, as its text.
    """
    code, scope, name = function.__code__, function.__globals__, function.__name__
    copy = FunctionType(code, scope, name, function.__defaults__)
    copy.__module__, copy.__kwdefaults__, copy.__doc__ = __name__, function.__kwdefaults__, function.__doc__
    copy.__annotations__ = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    copy.__annotations__ = get_type_hints(copy, {**scope, "PathLike": str})
    if (
        "verifier" in copy.__annotations__
    ):  # text, too: jsonargparse would import a function before it is asked for
        copy.__annotations__["verifier"] = str | None
    return copy


def options_of(command: str) -> set[str]:
    """Return the names of a command's options, those of a reset as ``reset.scope``."""
    return set(known_options(command)).difference(SHOWN)


def known_options(command: str) -> dict[str, bool]:
    """Return the names of all that a command takes as an option, and of each whether it is text alone."""
    shown = dict.fromkeys(SHOWN, False)
    if command not in COMMANDS:
        return shown
    kinds = _without_result(COMMANDS[command]).__annotations__
    known = {
        name: not {bool, int, float}.intersection(get_args(kind) or (kind,))
        for name, kind in kinds.items()
        if name != "progress"
    }
    if command == "rejuvenate":
        inside = {f"{name}.{field.name}": False for name, kind in OBJECTS.items() for field in fields(kind)}
        known |= {**inside, "merge": False, "no_hash": False, "reset_fraction": False}
    return known | shown


def defaults_of(command: str) -> dict[str, Any]:
    """Return what a command's function takes, with the defaults."""
    parameters = inspect.signature(COMMANDS[command]).parameters if command in COMMANDS else {}
    return {name: found.default for name, found in parameters.items() if name != "progress"}
