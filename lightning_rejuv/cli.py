"""The command ``lightning-rejuv``: diagnose, rejuvenate and verify checkpoints on disk."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_FAULTS, _REFUSED, _IO, _INTERRUPTED = 1, 3, 4, 130

_DESCRIPTION = """\
Restore the plasticity of an over-trained language model between SFT and RL.

SFT that runs too long leaves a model that RL hardly improves: it is far from its base and sure of every token.
Rejuvenation (arXiv 2606.09932) writes

    alpha * SFT model + (1 - alpha) * base

and then returns the neurons that push hardest on over-confident tokens to the base. The output is an ordinary
Hugging Face directory with the SFT model's tokenizer, chat template and generation config; any RL trainer
starts from it."""

_EPILOG = """\
typical use:
  lightning-rejuv diagnose   --base Qwen3-4B-Base --sft runs/sft --calibration sft.jsonl
  lightning-rejuv rejuvenate --base Qwen3-4B-Base --sft runs/sft --out runs/start --calibration sft.jsonl
  lightning-rejuv verify     runs/start

exit codes: 0 done; 1 verify found a fault; 2 wrong usage; 3 the input was refused, nothing is written;
4 reading or writing failed (no such file, disk full), nothing is left under the output's name; 130 interrupted"""

_DTYPES = ("float32", "bfloat16", "float16")
# The rules that find alpha with calibration data alone.
_RULES = ("auto", "kl_balance", "entropy_ratio")

_CALIBRATION = (
    'JSONL, a few dozen lines in the style of the SFT data: {"prompt": …, "response": …} as plain '
    "text, or "
    "{\"messages\": […]} that end with the assistant's, rendered with the SFT model's own chat template"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parsed = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode is no reason to fail
    # The libraries' own bars and hints would stand between ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return int(parsed.run(parsed))
    except KeyboardInterrupt:
        if getattr(parsed, "written", False):  # interrupted while it was reported on: the output is whole
            return 0
        return _fail("interrupted: nothing is left under the output's name", _INTERRUPTED)
    except OSError as error:
        return _fail(str(error), _IO)
    except (ValueError, TypeError, ImportError) as error:
        return _fail(str(error), _REFUSED)


def _fail(message: str, code: int) -> int:
    print(f"lightning-rejuv: error: {message}", file=sys.stderr)
    return code


def _rejuvenate(parsed: argparse.Namespace) -> int:
    from lightning_rejuv import handoff

    alpha = _alpha(parsed.alpha)
    shared: dict[str, Any] = {
        "dtype": parsed.dtype,
        "stochastic_rounding": parsed.stochastic_rounding,
        "seed": parsed.seed,
        "bar": None if parsed.quiet else _bar,
    }
    if handoff.is_adapter(parsed.sft):
        report = _adapter(parsed, alpha, shared)
    else:
        if parsed.base is None:
            raise ValueError("Expected `--base`: only a LoRA adapter can be fused without reading its base.")
        if parsed.merge:
            raise ValueError(f"Expected an adapter for `--merge` but {str(parsed.sft)!r} is a whole model.")
        report = handoff.rejuvenate_checkpoint(
            parsed.base,
            parsed.sft,
            parsed.out,
            alpha=alpha,
            reset_fraction=parsed.reset_fraction,
            calibration=parsed.calibration,
            device=parsed.device,
            compute_dtype=parsed.compute_dtype,
            **shared,
        )
    parsed.written = True
    _print(report, parsed)
    return 0


def _adapter(parsed: argparse.Namespace, alpha: Any, shared: dict[str, Any]) -> Any:
    from lightning_rejuv import handoff

    if isinstance(alpha, str) or parsed.reset_fraction > 0:
        raise ValueError(
            f"{str(parsed.sft)!r} is an adapter: the reset and `--alpha auto` need a whole model. Pass "
            "`--reset-fraction 0` and a number, or merge first with `--alpha 1 --reset-fraction 0 --merge`."
        )
    if not parsed.merge:
        unused = [name for name in ("dtype", "stochastic_rounding") if shared[name]]
        if unused:
            raise ValueError(
                f"An adapter keeps its dtype: `--{unused[0].replace('_', '-')}` needs `--merge`."
            )
        return handoff.rejuvenate_adapter(parsed.sft, parsed.out, base=parsed.base, alpha=alpha)
    if parsed.base is None:
        raise ValueError("Expected `--base` to merge the adapter into.")
    return handoff.merge_adapter(parsed.base, parsed.sft, parsed.out, alpha=alpha, **shared)


def _diagnose(parsed: argparse.Namespace) -> int:
    from lightning_rejuv import handoff

    diagnosis = handoff.diagnose(
        parsed.base,
        parsed.sft,
        calibration=parsed.calibration,
        verifier=parsed.verifier,
        device=parsed.device,
        compute_dtype=parsed.compute_dtype,
        bar=None if parsed.quiet else _bar,
    )
    _print(diagnosis, parsed)
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from lightning_rejuv import handoff

    verification = handoff.verify(parsed.directory, None if parsed.quiet else _bar)
    _print(verification, parsed)
    return 0 if verification else _FAULTS


def _print(report: Any, parsed: argparse.Namespace) -> None:
    if parsed.json:
        print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    elif not parsed.quiet:
        print(report)


def _alpha(text: str) -> Any:
    from lightning_rejuv.handoff import read_alphas

    if text in _RULES:
        return text
    if text.endswith((".yaml", ".yml")):
        return read_alphas(Path(text))
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"Expected `--alpha` to be a number in [0, 1], one of {', '.join(_RULES)} or a YAML file but "
            f"got {text!r}."
        ) from None


def _bar(total: int) -> Callable[[int], object]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.monitor_interval = 0  # no thread of its own, which an interrupt could leave waiting for a lock
    # `disable=None` leaves it out where standard error is no terminal.
    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)

    def advance(done: int) -> None:
        bar.update(done)
        if bar.n >= total:
            bar.close()

    return advance


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="lightning-rejuv", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add, name, run, text in (
        (_diagnose_arguments, "diagnose", _diagnose, _DIAGNOSE),
        (_rejuvenate_arguments, "rejuvenate", _rejuvenate, _REJUVENATE),
        (_verify_arguments, "verify", _verify, _VERIFY),
    ):
        command = commands.add_parser(
            name, help=text.partition("\n")[0], description=text, formatter_class=raw
        )
        add(command)
        command.add_argument("--json", action="store_true", help="print the report as JSON")
        command.add_argument(
            "--quiet", action="store_true", help="no progress bar, and no report but `--json`"
        )
        command.set_defaults(run=run)
    return parser


_DIAGNOSE = """\
how far SFT has gone, whether it went too far, and which alpha fits

Without calibration data only files are read: drift of every tensor from the base, what rounding would take
from a fusion, tying, vocabulary, chat template and EOS. With calibration data both models are run on it: token
entropy of the SFT model and of the base on the same responses, and how likely the SFT model still finds what
the base would say."""

_REJUVENATE = """\
write a checkpoint that RL can start from

The output appears whole under its name, or not at all; inputs are never written to. Fusion alone
(`--reset-fraction 0 --alpha 0.4`) reads and writes files in pieces and needs no calibration data and next to no
memory. If `--sft` is a LoRA adapter, so is the output: its update is scaled, and the base is not even read."""

_VERIFY = """\
is a checkpoint directory whole and loadable?

Index, headers, shapes, dtypes, NaN, tying, vocabulary, tokenizer, chat template, EOS and generation config; if
it was written by this command, also that its files are what was written. Exit code 1 if there is a fault."""


def _diagnose_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="the checkpoint SFT started from"
    )
    command.add_argument("--sft", type=Path, required=True, metavar="DIR", help="the SFT model")
    command.add_argument("--calibration", type=Path, metavar="FILE.jsonl", help=_CALIBRATION)
    command.add_argument(
        "--verifier",
        metavar="MODULE:FUNCTION",
        help="a function (prompt, response) -> bool that tells right answers: support retention is then of the "
        "base's right answers to the calibration prompts",
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
        default="auto",
        metavar="auto|0.4|FILE.yaml",
        help='weight of the SFT model; "auto" (the default) finds the largest that keeps the base\'s own answers '
        "likely (other rules: kl_balance, entropy_ratio); a number: the smaller, the more of the base; a YAML file "
        "maps patterns of tensor names to alphas, the first that fits counts",
    )
    command.add_argument(
        "--reset-fraction",
        type=float,
        default=0.02,
        metavar="F",
        help="share of all neurons that is reset (default 0.02; 0 is fusion alone)",
    )
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.jsonl",
        help=_CALIBRATION + "; for the reset and for `--alpha auto`",
    )
    command.add_argument("--dtype", choices=_DTYPES, help="default: the SFT model's")
    command.add_argument(
        "--stochastic-rounding",
        action="store_true",
        help="round half types stochastically: after mild SFT most updates are one step of bfloat16 wide, and "
        "rounding to nearest puts their half way back to one end",
    )
    command.add_argument("--merge", action="store_true", help="with an adapter: write the whole model")
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of rounding and sampling (default 0)"
    )
    _model_arguments(command)


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="where models are run (default cpu)")
    command.add_argument(
        "--compute-dtype", default="float32", choices=_DTYPES, help="their dtype (default float32)"
    )


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", type=Path, metavar="DIR")


if __name__ == "__main__":
    sys.exit(main())
