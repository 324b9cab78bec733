"""Messages of the functions in Python, in the command's own flags."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from lightning_rejuv.cli.arguments import Parsed
from lightning_rejuv.cli.parser import options_of
from lightning_rejuv.cli.recipe import flag

# Messages name an argument in backticks, with or without a value: `alpha`, `alpha='auto'`, `steps` of `Refit`.
_ARGUMENT = re.compile(
    r"(?:argument )?`(?P<name>[a-z_]+)(?:=(?P<value>[^`]*))?`(?: of `(?P<of>Reset|Refit)`)?"
)
_MERGE_FIRST = re.compile(r"`merge_adapter\([^`]*\)`")
# Options that have another name in the command, and those that only Python has.
_CALLED = {"model": "sft", "anchor": "base", "merge_adapter": "merge"}
_IN_PYTHON = ("loss", "sampler", "verifier", "optimizer", "optimizer_state", "resize_vocabulary")


def in_flags(message: str, parsed: Parsed) -> str:
    """Return a message of the functions in Python with the command's flags for their arguments.

    What another command takes, or Python alone, is said to be so in a sentence at the end.

    Args:
        message: names arguments in backticks, and how an adapter is merged as `` `merge_adapter(…)` ``.
        parsed: what the command was given.

    >>> parsed = Parsed("diagnose", {"base": "base", "sft": "sft"})
    >>> in_flags("Expected argument `compute_dtype` to be a dtype. Pass `reset=None`.", parsed)
    'Expected `--compute-dtype` to be a dtype. Pass `--reset null`. `--reset` is an option of ...
    """
    own, others, python = options_of(parsed.command), options_of("rejuvenate"), []
    elsewhere: list[str] = []

    def in_flag(found: re.Match[str]) -> str:
        given, value = found["name"], (found["value"] or "").strip("'\"")
        name = f"{found['of'].lower()}.{given}" if found["of"] else _CALLED.get(given, given)
        if name not in own and name in _IN_PYTHON:
            python.append(f"`{name}`")
        if not (name in own or name in others):
            return found[0]
        if name not in own:
            elsewhere.append(f"`{flag(name)}`")
        value = "null" if value == "None" else value
        return f"`{flag(name)} {value}`" if value else f"`{flag(name)}`"

    text = _ARGUMENT.sub(in_flag, _MERGE_FIRST.sub(lambda _: f"`{merge_first(parsed)}`", message))
    if elsewhere:
        are = "is an option" if len(set(elsewhere)) == 1 else "are options"
        text += f" {_listed(elsewhere)} {are} of `lightning-rejuv rejuvenate`"
        calibrated = "calibration" in parsed.given
        text += "; without `--calibration` `lightning-rejuv diagnose` runs no model." if calibrated else "."
    if python:
        text += f" `lightning_rejuv.rejuvenate` in Python takes {_listed(python)}; the command has no such option."
    return text


def _listed(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def merge_first(parsed: Parsed) -> str:
    """Return the command that merges the adapter of ``--sft`` and does nothing else."""
    base, sft = parsed.given.get("base", "BASE"), parsed.given.get("sft", "ADAPTER")
    given = ["--base", str(base), "--sft", str(sft), "--out", "MERGED"]
    return shlex.join(["lightning-rejuv", "rejuvenate", *given, "--alpha", "1", "--merge"])
