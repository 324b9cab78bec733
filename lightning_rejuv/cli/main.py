"""The command ``lightning-rejuv``: diagnose, rejuvenate and verify checkpoints on disk."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_rejuv.cli.arguments import Parsed, made, parse
from lightning_rejuv.cli.messages import in_flags, merge_first
from lightning_rejuv.cli.parser import USAGE
from lightning_rejuv.cli.process import Interruption, complain, emit, prepare_streams, standard_output_kept
from lightning_rejuv.cli.recipe import flag
from lightning_rejuv.names import printable

_FAULTS, _REFUSED, _IO = 1, 3, 4


_BAR = "{desc}: {percentage:3.0f} % |{bar:30}| {elapsed}, {remaining} left"


class _UsageError(Exception):
    """Raised for a command line that cannot be meant on this machine, before anything is read."""


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


def _run(parsed: Parsed, interruption: Interruption) -> int:
    # Other libraries' bars and hints would stand between those of the command.
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
        except SystemExit as error:  # of a verifier, say: an exit code of the command has a meaning
            raise RuntimeError(f"a library ended the process with SystemExit({error.code!r})") from error
    if parsed.json:
        emit(
            json.dumps(report.to_dict(), indent=1) + "\n"
        )  # as ASCII, which every terminal and pipe can hold
    elif not parsed.quiet:
        emit(f"{printable(str(report))}\n")
    return code


def _answer(error: BaseException, interruption: Interruption, parsed: Parsed | None) -> tuple[str, int]:
    """Return what is said of an error, and the exit code that it gives."""
    if isinstance(error, KeyboardInterrupt) or interruption.signals:
        # If an extension module is importing something, Ctrl-C may come out of it as an error of another kind.
        out = parsed.given.get("out") if parsed else None
        left = ": nothing is left under the output's name" if out and not Path(out).exists() else ""
        return f"interrupted{left}", interruption.exit_code
    text, kind = str(error), type(error).__name__
    if isinstance(error, _UsageError):
        return text, USAGE
    if isinstance(error, OSError):
        return _of_file(error, parsed) or text or kind, _IO
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            f"There is not enough memory ({kind}: {text[:300]}). Models are run by the reset, by `--alpha auto`, by "
            "`--refit` and by `diagnose --calibration`: use `--compute-dtype bfloat16`, another `--device` or "
            "shorter lines.",
            _REFUSED,
        )
    if isinstance(error, (ValueError, ImportError)) and text:
        return text, _REFUSED
    hint = "was not expected" if parsed and parsed.traceback else "was not expected; `--traceback` says where"
    return f"{kind}: {text[:600]} (this {hint})", _REFUSED


def _of_file(error: OSError, parsed: Parsed | None) -> str | None:
    """Return an error of the system with the options that name the file; None if none does."""
    given = parsed.given if parsed else {}
    names = [
        f"`{flag(name)}`"
        for name, value in given.items()
        if isinstance(value, str) and value == error.filename
    ]
    return f"{' or '.join(names)} cannot be read or written: {error}." if names else None


def _rejuvenate(parsed: Parsed, checkpoints: Any, progress: Any) -> tuple[Any, int]:
    given = dict(parsed.given)
    sft, out = given.pop("sft"), given.pop("out")
    base, merge = given.pop("base", None), given.pop("merge", False)
    from lightning_rejuv.checkpoints import options

    if checkpoints.is_adapter(sft):
        _refuse_what_runs_a_model(parsed)
        if merge:
            if base is None:
                raise ValueError("Expected `--base` to merge the adapter into.")
            return checkpoints.merge_adapter(base, sft, out, progress=progress, **given), 0
        of_tensors = [name for name in ("dtype", "rounding", "seed") if name in given]
        options.refuse_idle(of_tensors, "with an adapter, which keeps its dtype", "pass `merge`")
        return checkpoints.rejuvenate_adapter(sft, out, base=base, **given), 0
    _check_device(parsed)
    if base is None:
        raise ValueError("Expected `--base`: only a LoRA adapter can be fused without reading its base.")
    if merge:
        raise ValueError(f"Expected an adapter for `--merge` but {sft!r} is a whole model.")
    return checkpoints.rejuvenate_checkpoint(base, sft, out, progress=progress, **made(given)), 0


def _refuse_what_runs_a_model(parsed: Parsed) -> None:
    given = parsed.given
    asked = ["`--alpha auto`"] if given.get("alpha") == "auto" else []
    of_models = ("reset", "calibration", "device", "compute_dtype", "refit")
    asked += [f"`{flag(name)}`" for name in of_models if name in given]
    if asked:
        raise ValueError(
            f"Expected no {', '.join(asked)} with an adapter, for which no model is run, but {given['sft']!r} is "
            f"one. Merge it first (`{merge_first(parsed)}`) and pass `--sft MERGED`, rejuvenate it in memory "
            "(`lightning_rejuv.rejuvenate` in Python), or leave that out."
        )


def _diagnose(parsed: Parsed, checkpoints: Any, progress: Any) -> tuple[Any, int]:
    from lightning_rejuv.checkpoints import options

    _check_device(parsed)
    if "calibration" not in parsed.given:  # also what has no effect because it is the default
        of_models = [name for name in ("device", "compute_dtype") if name in parsed.given]
        options.refuse_idle(of_models, *options.WITHOUT_CALIBRATION)
    return checkpoints.diagnose(**parsed.given, progress=progress), 0


def _verify(parsed: Parsed, checkpoints: Any, progress: Any) -> tuple[Any, int]:
    verification = checkpoints.verify(parsed.given["path"], progress)
    return verification, 0 if verification else _FAULTS


def _check_device(parsed: Parsed) -> None:
    if "device" not in parsed.given:
        return
    from lightning_rejuv.checkpoints.options import check_device

    try:
        check_device(parsed.given["device"])
    except ValueError as error:
        raise _UsageError(str(error)) from error


@contextmanager
def _progress(parsed: Parsed, interruption: Interruption) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows each phase as a bar with the time left, and stops if a signal has come."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.monitor_interval = 0  # no thread of its own, which an interrupt could leave waiting for a lock
    # `disable=None` leaves it out if standard error is no terminal.
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
