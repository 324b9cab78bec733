"""The command ``lightning-rejuv``: diagnose, rejuvenate and verify checkpoints on disk."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_rejuv.arguments import USAGE, flag, in_flags, merge_first, parse
from lightning_rejuv.names import printable
from lightning_rejuv.process import Interruption, complain, emit, prepare_streams, standard_output_kept

_FAULTS, _REFUSED, _IO = 1, 3, 4


_BAR = "{desc}: {percentage:3.0f} % |{bar:30}| {elapsed}, {remaining} left"


class _UsageError(Exception):
    """A command line that cannot mean anything here; found before anything is read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    interruption, parsed = Interruption(), None
    try:
        with interruption.listening():
            prepare_streams()
            try:
                parsed = parse(arguments)
            finally:
                emit("")  # what argparse printed
            return _run(parsed, interruption)
    except SystemExit:
        raise
    except BaseException as error:  # a panic of an extension module is no Exception
        if parsed is not None and parsed.traceback:
            traceback.print_exc()
        message, code = _answer(error, interruption, parsed)
        message = message if parsed is None else in_flags(message, parsed)
        complain(f"lightning-rejuv: error: {printable(' '.join(message.split()))}")
        return code


def _run(parsed: argparse.Namespace, interruption: Interruption) -> int:
    # The libraries' own bars and hints would stand between ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            with interruption.waiting():
                from lightning_rejuv import checkpoints

            command = {"diagnose": _diagnose, "rejuvenate": _rejuvenate, "verify": _verify}[parsed.command]
            with standard_output_kept(), _progress(parsed, interruption) as progress:
                report, code = command(parsed, checkpoints, progress)
        except SystemExit as error:  # of a verifier, say: an exit code of ours has a meaning
            raise RuntimeError(f"a library ended the process with SystemExit({error.code!r})") from error
    if parsed.json:
        emit(
            json.dumps(report.to_dict(), indent=1) + "\n"
        )  # as ASCII, which every terminal and pipe can hold
    elif not parsed.quiet:
        emit(f"{printable(str(report))}\n")
    return code


def _answer(
    error: BaseException, interruption: Interruption, parsed: argparse.Namespace | None
) -> tuple[str, int]:
    """What is said of an error, and the exit code that it gives."""
    if isinstance(error, KeyboardInterrupt) or interruption.signals:
        # Where an extension module imports something, Ctrl-C may leave it as an error of another kind.
        left = (
            "" if Path(getattr(parsed, "out", "")).exists() else ": nothing is left under the output's name"
        )
        return f"interrupted{left if hasattr(parsed, 'out') else ''}", interruption.exit_code
    text, kind = str(error), type(error).__name__
    if isinstance(error, _UsageError):
        return text, USAGE
    if isinstance(error, OSError):
        return text or kind, _IO
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            f"There is not enough memory ({kind}: {text[:300]}). Models are run by the reset, by `--alpha auto`, by "
            "`--refit-steps` and by `diagnose --calibration`: use `--compute-dtype bfloat16`, another `--device` or "
            "shorter lines.",
            _REFUSED,
        )
    if isinstance(error, (ValueError, ImportError)) and text:
        return text, _REFUSED
    hint = (
        "was not expected"
        if getattr(parsed, "traceback", False)
        else "was not expected; `--traceback` says where"
    )
    return f"{kind}: {text[:600]} (this {hint})", _REFUSED


def _rejuvenate(parsed: argparse.Namespace, checkpoints: Any, progress: Any) -> tuple[Any, int]:
    adapter = checkpoints.is_adapter(parsed.sft)
    if not adapter:
        _check_device(parsed.device)
        if parsed.base is None:
            raise ValueError("Expected `--base`: only a LoRA adapter can be fused without reading its base.")
        if parsed.merge:
            raise ValueError(f"Expected an adapter for `--merge` but {str(parsed.sft)!r} is a whole model.")
    given = {
        "alpha": None if parsed.alpha is None else _alpha(parsed.alpha),
        "dtype": parsed.dtype,
        "rounding": parsed.rounding,
        "seed": parsed.seed,
    }
    refit = _refit(parsed)
    if adapter:
        return _adapter(parsed, checkpoints, _said(given), progress), 0
    only = ("reset_fraction", "calibration", "device", "compute_dtype")
    given |= {name: getattr(parsed, name) for name in only} | {"refit": refit}
    return checkpoints.rejuvenate_checkpoint(
        parsed.base, parsed.sft, parsed.out, progress=progress, **_said(given)
    ), 0


def _refit(parsed: argparse.Namespace) -> Any:
    from lightning_rejuv.config import Refit

    if parsed.refit_steps is None:
        _refuse(parsed, ("refit_learning_rate",), "without `--refit-steps` nothing is trained")
        return None
    return Refit(steps=parsed.refit_steps, learning_rate=parsed.refit_learning_rate)


def _adapter(parsed: argparse.Namespace, checkpoints: Any, given: dict[str, Any], progress: Any) -> Any:
    asked = ["`--alpha auto`"] if isinstance(given.get("alpha"), str) else []
    # Not a number, too, is not 0.
    asked += ["`--reset-fraction`"] if parsed.reset_fraction not in (None, 0) else []
    of_models = ("calibration", "device", "compute_dtype", "refit_steps", "refit_learning_rate")
    asked += [f"`{flag(name)}`" for name in of_models if getattr(parsed, name) is not None]
    if asked:
        raise ValueError(
            f"Expected no {', '.join(asked)} with an adapter, for which no model is run, but {str(parsed.sft)!r} is "
            f"one. Merge it first (`{merge_first(parsed)}`) and pass `--sft MERGED`, rejuvenate it in memory "
            "(`lightning_rejuv.rejuvenate` in Python), or leave that out."
        )
    if not parsed.merge:
        needs_merge = "an adapter keeps its dtype; `--merge` writes the whole model"
        _refuse(parsed, ("dtype", "rounding", "seed"), needs_merge)
        return checkpoints.rejuvenate_adapter(parsed.sft, parsed.out, base=parsed.base, **given)
    if parsed.base is None:
        raise ValueError("Expected `--base` to merge the adapter into.")
    return checkpoints.merge_adapter(parsed.base, parsed.sft, parsed.out, progress=progress, **given)


def _diagnose(parsed: argparse.Namespace, checkpoints: Any, progress: Any) -> tuple[Any, int]:
    _check_device(parsed.device)
    if parsed.calibration is None:
        _refuse(parsed, ("device", "compute_dtype"), "without `--calibration` no model is run")
    given = {name: getattr(parsed, name) for name in ("calibration", "verifier", "device", "compute_dtype")}
    return checkpoints.diagnose(parsed.base, parsed.sft, progress=progress, **_said(given)), 0


def _verify(parsed: argparse.Namespace, checkpoints: Any, progress: Any) -> tuple[Any, int]:
    verification = checkpoints.verify(parsed.directory, progress)
    return verification, 0 if verification else _FAULTS


def _said(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; of all others the functions know the defaults."""
    return {name: value for name, value in given.items() if value is not None}


def _refuse(parsed: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(parsed, name) not in (None, False):
            raise ValueError(f"Expected no `{flag(name)}`, which would have no effect: {why}. Leave it out.")


def _check_device(device: str | None) -> None:
    if device is None:
        return
    from lightning_rejuv.checkpoints.device import check_device

    try:
        check_device(device)
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _alpha(text: str) -> Any:
    from lightning_rejuv.checkpoints import read_alphas

    if text == "auto":
        return text
    if text.endswith((".yaml", ".yml")):
        return read_alphas(Path(text))
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"Expected `--alpha` to be a number in [0, 1], auto or a YAML file but got {text!r}."
        ) from None


@contextmanager
def _progress(
    parsed: argparse.Namespace, interruption: Interruption
) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows each phase as a bar with the time left, and stops where a signal has come."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.monitor_interval = 0  # no thread of its own, which an interrupt could leave waiting for a lock
    # `disable=None` leaves it out where standard error is no terminal.
    options = {"disable": True if parsed.quiet else None, "leave": False}
    bar = tqdm(disable=True)

    def tell(phase: str, done: int, total: int) -> None:
        nonlocal bar
        interruption.check()
        if done == 0:
            bar.close()
            # A phase of one step has no time left to tell: it is only named.
            bar = tqdm(desc=phase, total=total, bar_format=_BAR if total > 1 else "{desc} …", **options)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    try:
        yield tell
    finally:
        bar.close()


if __name__ == "__main__":
    sys.exit(main())
