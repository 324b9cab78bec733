"""What the command ``lightning-rejuv`` takes, and how it calls what the functions in Python take.

Nothing here needs torch, so that help is printed at once.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

USAGE = 2

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

exit codes: 0 done; 1 verify found a fault; 2 wrong usage (a device that is not there is, and so is no command);
3 the input was refused or the computation failed, nothing is left under the output's name; 4 reading or writing
failed (no such file, disk full), nothing is left under the output's name; 130 interrupted, 143 terminated, 129
hung up. An error is one line on standard error; `--traceback` prints where it comes from, too."""

# Messages name an argument in backticks, with or without a value: `alpha`, `alpha='auto'`, `steps` of `Refit`.
_ARGUMENT = re.compile(r"(?:argument )?`(?P<name>[a-z_]+)(?:=(?P<value>[^`]*))?`(?P<refit> of `Refit`)?")
_MERGE_FIRST = re.compile(r"`merge_adapter\([^`]*\)`")
# Options that have another name, and those that the command has not at all.
_CALLED = {"model": "sft", "anchor": "base", "refit": "refit_steps", "merge_adapter": "merge"}
_IN_PYTHON = (
    *("omega", "positions", "positions_per_response", "quantity", "rank_by", "scope", "budget"),
    *("loss", "sampler", "verifier", "optimizer", "optimizer_state", "resize_vocabulary"),
)

_DTYPES = ("float32", "bfloat16", "float16")

_CALIBRATION = (
    "JSONL, a few dozen lines in the style of the SFT data, which SFT has not seen: "
    '{"prompt": …, "response": …} as plain text, or '
    "{\"messages\": […]} that end with the assistant's, rendered with the SFT model's own chat template"
)

_DIAGNOSE = """\
how far SFT has gone, whether it went too far, and which alpha fits

Without calibration data only files are read: drift of every tensor from the base, what rounding would take
from a fusion, tying, vocabulary, chat template and EOS. With calibration data both models are run: token entropy
and likelihood of the same responses, whether the format that they share is there, what the base samples
itself, and a search for alpha between the two. A verifier makes the verdict much surer."""

_REJUVENATE = """\
write a checkpoint that RL can start from

The output appears whole under its name, or not at all; inputs are never written to. Fusion by a number
(`--alpha 0.4`) reads and writes files in pieces and needs no calibration data and next to no
memory. If `--sft` is a LoRA adapter, so is the output: its update is scaled, by 0.4 where `--alpha` is not given,
and the base is not even read. An option that would have no effect is refused by name."""

_VERIFY = """\
is a checkpoint directory whole and loadable?

Index, headers, shapes, dtypes, NaN, tying, vocabulary, tokenizer, chat template, EOS and generation config; if
it was written by this command, also that its files are what was written. Exit code 1 if there is a fault."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line: ``command``, and what it was given; None where an option was not.

    Raises:
        SystemExit: after help or the version (0), and where the usage is wrong or there is no command (2).
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        parser.exit(USAGE)
    return parsed


def in_flags(message: str, parsed: argparse.Namespace) -> str:
    """Return a message of the functions in Python with the flags that their arguments have here.

    What another command takes, or Python alone, is said to be so in a sentence at the end.

    Args:
        message: names arguments in backticks, and how an adapter is merged as `` `merge_adapter(…)` ``.
        parsed: what the command was given.

    >>> parsed = parse(["diagnose", "--base", "base", "--sft", "sft"])
    >>> in_flags("Expected argument `compute_dtype` to be a dtype. Set `reset_fraction=0`.", parsed)
    'Expected `--compute-dtype` to be a dtype. Set `--reset-fraction 0`. `--reset-fraction` is an option of ...
    """
    own, others, python = vars(parsed), vars(parse(["rejuvenate", "--sft=", "--out="])), []
    elsewhere: list[str] = []

    def in_flag(found: re.Match[str]) -> str:
        given, value = found["name"], (found["value"] or "").strip("'\"")
        name = f"refit_{given}" if found["refit"] else _CALLED.get(given, given)
        if name not in own and name in _IN_PYTHON:
            python.append(f"`{name}`")
        if name in ("command", "directory") or not (name in own or name in others):
            return found[0]
        if name not in own:
            elsewhere.append(f"`{flag(name)}`")
        return f"`{flag(name)} {value}`" if value else f"`{flag(name)}`"

    text = _ARGUMENT.sub(in_flag, _MERGE_FIRST.sub(lambda _: f"`{merge_first(parsed)}`", message))
    if elsewhere:
        are = "is an option" if len(set(elsewhere)) == 1 else "are options"
        text += f" {_listed(elsewhere)} {are} of `lightning-rejuv rejuvenate`"
        calibrated = getattr(parsed, "calibration", None) is not None
        text += "; without `--calibration` `lightning-rejuv diagnose` runs no model." if calibrated else "."
    if python:
        text += f" `lightning_rejuv.rejuvenate` in Python takes {_listed(python)}; the command has no such option."
    return text


def _listed(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def flag(name: str) -> str:
    """Return the flag of an option.

    >>> flag("compute_dtype")
    '--compute-dtype'
    """
    return f"--{name.replace('_', '-')}"


def merge_first(parsed: argparse.Namespace) -> str:
    """Return the command that merges the adapter of ``--sft`` and does nothing else."""
    base, sft = getattr(parsed, "base", None) or "BASE", getattr(parsed, "sft", "ADAPTER")
    given = ["--base", str(base), "--sft", str(sft), "--out", "MERGED"]
    return shlex.join(["lightning-rejuv", "rejuvenate", *given, "--alpha", "1", "--merge"])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line; argparse prints the whole usage before it."""
        text = " ".join(message.split())
        self.exit(USAGE, f"{self.prog}: error: {text} (`{self.prog} --help` lists the options)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # The version is looked up only where it is asked for.
        from lightning_rejuv import __version__

        print(f"lightning-rejuv {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="lightning-rejuv", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for add, name, text in (
        (_diagnose_arguments, "diagnose", _DIAGNOSE),
        (_rejuvenate_arguments, "rejuvenate", _REJUVENATE),
        (_verify_arguments, "verify", _VERIFY),
    ):
        command = commands.add_parser(
            name, help=text.partition("\n")[0], description=text, formatter_class=raw
        )
        add(command)
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        command.add_argument(
            "--quiet", action="store_true", help="no progress bar, and no report but `--json`"
        )
        command.add_argument("--traceback", action="store_true", help="print the traceback of an error, too")
    return parser


def _diagnose_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="the checkpoint SFT started from"
    )
    command.add_argument("--sft", type=Path, required=True, metavar="DIR", help="the SFT model")
    command.add_argument("--calibration", type=Path, metavar="FILE.jsonl", help=_CALIBRATION)
    command.add_argument(
        "--verifier",
        metavar="MODULE:FUNCTION",
        help="a function (prompt, response) -> bool (or 0 and 1) that tells right answers, of a module that is "
        "installed or in the working directory: 128 rollouts of the SFT model are then judged, which decides the "
        "verdict, and some at the alpha that was found. The prompt is a plain line's to the letter; of a line with "
        "messages it is what the chat template renders of all but the last",
    )
    _model_arguments(command)


def _rejuvenate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base", type=Path, metavar="DIR", help="the checkpoint SFT started from, or an early one"
    )
    command.add_argument(
        "--sft", type=Path, required=True, metavar="DIR", help="the SFT model, or a LoRA adapter"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist")
    command.add_argument(
        "--alpha",
        metavar="auto|0.4|FILE.yaml",
        help='weight of the SFT model; "auto" (the default) is 0.4, unless calibration data and the base\'s own '
        "samples speak against it; a number: the smaller, the more of the base; a YAML file maps patterns of tensor "
        "names to alphas, the first that fits counts. For an adapter the default is 0.4",
    )
    command.add_argument(
        "--reset-fraction",
        type=float,
        metavar="F",
        help="share of all neurons that is reset after the fusion (default 0, none)",
    )
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.jsonl",
        help=_CALIBRATION + "; for `--alpha auto`, a reset and a refit",
    )
    command.add_argument(
        "--refit-steps",
        type=int,
        metavar="N",
        help="after the edit (or with `--alpha 1` instead of it) train so many steps on the "
        "calibration data and on what the base itself answers to its prompts (default none); it takes 25 bytes of "
        "memory for each weight",
    )
    command.add_argument(
        "--refit-learning-rate", type=float, metavar="R", help="of those steps, with AdamW (default 2e-5)"
    )
    command.add_argument("--dtype", choices=_DTYPES, help="default: the SFT model's")
    command.add_argument(
        "--rounding",
        choices=("stochastic", "nearest"),
        help="to half types (default stochastic, which keeps alpha on average: most updates of mild SFT are one step "
        "of bfloat16 wide, and to nearest all of them go back to one end)",
    )
    command.add_argument("--merge", action="store_true", help="with an adapter: write the whole model")
    command.add_argument(
        "--seed", type=int, metavar="N", help="of rounding, sampling and a refit (default 0)"
    )
    _model_arguments(command)


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="where models are run (default cpu)")
    command.add_argument(
        "--compute-dtype",
        choices=("auto", *_DTYPES),
        help="their dtype (default auto: bfloat16 where the device's hardware multiplies in it, else float32)",
    )


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", type=Path, metavar="DIR")
