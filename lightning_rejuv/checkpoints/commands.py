"""What can be asked of directories, in Python and, from the same signatures, on the command line.

This module needs no torch until a function is called, so that the command's help is printed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lightning_rejuv.config import ComputeDtype, Dtype, Options, PathLike, Refit, Reset, Rounding
from lightning_rejuv.progress import Listener

if TYPE_CHECKING:
    from lightning_rejuv.checkpoints.diagnosis import Diagnosis
    from lightning_rejuv.checkpoints.report import CheckpointReport


def rejuvenate_checkpoint(
    base: PathLike,
    sft: PathLike,
    out: PathLike,
    *,
    alpha: float | str | Mapping[str, float] = "auto",
    reset: Reset | None = None,
    refit: Refit | None = None,
    calibration: PathLike | None = None,
    device: str = "cpu",
    dtype: Dtype | None = None,
    compute_dtype: ComputeDtype = "auto",
    rounding: Rounding = "stochastic",
    seed: int = 0,
    hashes: bool = True,
    progress: Listener | None = None,
) -> CheckpointReport:
    """Write the rejuvenation of an SFT checkpoint: fusion with its base, then a reset or a refit if one is asked for.

    The output has the SFT model's names, shards, config, tokenizer, chat template and generation config. It
    appears under its name whole, or not at all; the inputs are never written to. Fusion streams: its memory
    does not grow with the model. The reset loads the SFT model to find the neurons; a refit trains it as the edit will
    leave it, and what that moved is added to the weights before they are rounded. An option that would have
    no effect is refused; those that the method has in memory mean the same as in
    :func:`lightning_rejuv.rejuvenate`.

    Args:
        base: directory of the checkpoint that SFT started from, or of an early one.
        sft: directory of the SFT model.
        out: directory to write; it must not exist.
        alpha: weight of the SFT model in the fusion; "auto" (the default) is 0.4, unless calibration data and the
            base's own samples speak against it; a number, 0 to 1: the smaller, the more of the base; or one for each
            pattern of names on disk, the first that fits counts: as a mapping, or as a YAML file that holds one.
        reset: which neurons are reset to the base after the fusion, how many and how; none by default.
        refit: training steps after the edit (or with an alpha of 1 instead of it) on the calibration data and on what
            the base itself answers to its prompts; none by default. It takes 25 bytes of memory for each weight.
        calibration: JSONL, a few dozen lines in the style of the SFT data, which SFT has not seen: either
            {"prompt": …, "response": …} as plain text, or {"messages": […]} that end with the assistant's, rendered
            with the SFT model's own chat template. For an alpha of "auto", a reset and a refit.
        device: the device that models are run on.
        dtype: the output's dtype; by default the SFT model's.
        compute_dtype: the dtype that models are run in; "auto" is bfloat16 if the device's hardware multiplies in it,
            and float32 otherwise; the report says which it was.
        rounding: how weights are rounded to half types; "stochastic" keeps alpha on average: most updates of mild SFT
            are one step of bfloat16 wide, and to "nearest" all of them go back to one end.
        seed: the seed of stochastic rounding, sampling, the random control and the order of a refit.
        hashes: whether the report names the SHA-256 of every input and output; without, `verify` cannot tell whether
            the files are still those that were written.
        progress: called with the name of each phase, how much of it is done, and how much it is in all (bytes
            of weights, forward passes or tokens).

    Returns:
        The report, which stands in the output as ``rejuvenation.json`` too; beside it stands ``rejuvenation.yaml``,
        with which ``lightning-rejuv rejuvenate --config`` does the same again. What is warned of on the way is raised
        as a warning and stands in its ``warnings``.

    Raises:
        ValueError: an argument, a file or a pair of checkpoints that cannot be fused. Nothing is written.
        FileExistsError: the output exists.
        OSError: reading or writing failed, or the disk is full; nothing is left under the output's name.

    Example: fusion alone.

        >>> import shutil, tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import load_file, save_file
        >>> root = Path(tempfile.mkdtemp())
        >>> for name, value in (("base", 0.0), ("sft", 1.0)):
        ...     (root / name).mkdir()
        ...     _ = (root / name / "config.json").write_text("{}")
        ...     save_file({"weight": torch.full((2,), value)}, root / name / "model.safetensors")
        >>> report = rejuvenate_checkpoint(root / "base", root / "sft", root / "out", alpha=0.25)
        >>> load_file(root / "out" / "model.safetensors")["weight"]
        tensor([0.2500, 0.2500])
        >>> shutil.rmtree(root)
    """
    from lightning_rejuv.checkpoints.options import Running, given_alpha
    from lightning_rejuv.checkpoints.rejuvenate import rejuvenate

    options = Options(alpha=given_alpha(alpha), reset=reset, refit=refit, rounding=rounding, seed=seed)
    running = Running(calibration, device, compute_dtype)
    return rejuvenate(base, sft, out, options, running, dtype, hashes, progress)


def diagnose(
    base: PathLike,
    sft: PathLike,
    *,
    calibration: PathLike | None = None,
    verifier: str | Callable[[str, str], object] | None = None,
    device: str = "cpu",
    compute_dtype: ComputeDtype = "auto",
    progress: Listener | None = None,
) -> Diagnosis:
    """Compare an SFT checkpoint with its base: how far SFT has gone, whether it went too far, and which alpha fits.

    Weights, vocabulary, tying, chat template and EOS are read from the files, in pieces. Entropy, the demonstrated
    format, the verdict and a recommendation need calibration data, for which the SFT model is loaded; if the
    search for alpha finds none, the rest is told all the same. The verdict is :func:`lightning_rejuv.verdict.judge`,
    as in ``PlasticityMonitor``; it is surest with a verifier, with which the SFT model also answers 16 of the prompts
    8 times each. A directory with ``rejuvenation.json`` is recognised as rejuvenated, if its weights are those that
    were written.

    Args:
        base: directory of the checkpoint that SFT started from.
        sft: directory of the SFT model.
        calibration: JSONL, as a rejuvenation takes it; without it no model is run.
        verifier: a function (prompt, response) -> bool (or 0 and 1) that tells right answers, or MODULE:FUNCTION,
            which is installed or in the working directory: 128 rollouts of the SFT model are then judged, which
            decides the verdict, and some at the alpha that was found. The prompt is a plain line's to the letter; of a
            line with messages it is what the chat template renders of all but the last, special tokens included. The
            response is without special tokens.
        device: the device that models are run on; only with calibration data.
        compute_dtype: the dtype that models are run in; "auto" is bfloat16 if the device's hardware multiplies in it,
            and float32 otherwise; only with calibration data.
        progress: called as in a rejuvenation.

    Raises:
        ValueError: checkpoints that do not belong together, malformed files, an option without an effect, a verifier
            that cannot be imported or called, or that answers anything but yes and no.
        RuntimeError: the verifier raised an exception, which is the cause.
        OSError: reading failed.
    """
    from lightning_rejuv.checkpoints.diagnosis import diagnose_checkpoint
    from lightning_rejuv.checkpoints.options import Running

    return diagnose_checkpoint(base, sft, Running(calibration, device, compute_dtype), verifier, progress)
