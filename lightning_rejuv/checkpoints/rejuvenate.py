"""From two checkpoints on disk to one that any RL trainer starts from."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lightning_rejuv import __version__
from lightning_rejuv.attribution import PositionRule, RankBy, Scope
from lightning_rejuv.checkpoints.checkpoint import (
    ADAPTER_CONFIG,
    INDEX,
    Checkpoint,
    PathLike,
    left_out,
    open_checkpoint,
)
from lightning_rejuv.checkpoints.device import compute_dtype_on
from lightning_rejuv.checkpoints.directory import check_free, new_directory, write_file
from lightning_rejuv.checkpoints.options import applied, check_options, check_seed
from lightning_rejuv.checkpoints.pairing import Pairing, pair_up
from lightning_rejuv.checkpoints.provenance import Hasher
from lightning_rejuv.checkpoints.record import a_second_time, find_record
from lightning_rejuv.checkpoints.refusals import check_fusable, check_same_architecture
from lightning_rejuv.checkpoints.report import CheckpointReport
from lightning_rejuv.checkpoints.same import check_differ
from lightning_rejuv.checkpoints.sidecar import copy_sidecar, index_bytes, links_out, new_index, sidecar_size
from lightning_rejuv.checkpoints.stream import DTYPES, FusionStream, Recipe, output_dtypes, output_size
from lightning_rejuv.checkpoints.write_report import check_apart, check_room, write_report
from lightning_rejuv.checkpoints.writer import FileWriter
from lightning_rejuv.config import Alpha, Budget, Options, Quantity, Refit, Rounding, alpha_by_name
from lightning_rejuv.progress import Listener, reporting
from lightning_rejuv.warned import collecting_warnings


def rejuvenate_checkpoint(
    base: PathLike,
    sft: PathLike,
    out: PathLike,
    *,
    alpha: Alpha = "auto",
    reset_fraction: float = 0.0,
    omega: float = 1.0,
    positions: PositionRule = "sharpened",
    positions_per_response: int = 1,
    quantity: Quantity = "entropy_gradient",
    rank_by: RankBy | None = None,
    scope: Scope = "model",
    budget: Budget = "share",
    calibration: PathLike | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    compute_dtype: str = "auto",
    rounding: Rounding = "stochastic",
    seed: int = 0,
    refit: Refit | None = None,
    progress: Listener | None = None,
) -> CheckpointReport:
    """Write the rejuvenation of an SFT checkpoint: fusion with its base, then a reset or a refit, if asked for.

    The output has the SFT model's names, shards, config, tokenizer, chat template and generation config. It
    appears under its name whole, or not at all; the inputs are never written to. Fusion streams: its memory
    does not grow with the model. The reset loads the SFT model to find the neurons; a refit trains it as the edit will
    leave it, and what that moved is added to the weights before they are rounded. An option that would have
    no effect is refused; those that the method has in memory mean the same as in
    :func:`lightning_rejuv.rejuvenate`.

    Args:
        base: directory of the checkpoint that SFT started from.
        sft: directory of the SFT model.
        out: directory to write; must not exist.
        alpha: weight of the SFT model in the fusion: ``"auto"`` is 0.4 unless the calibration data speak against
            it; a number, 0 to 1; or one for each pattern of names on disk.
        reset_fraction: share of the neurons that is reset, 0 to 1; 0, the default, resets none.
        omega: weight of the base on a reset neuron.
        positions: at which positions neurons are attributed.
        positions_per_response: at how many of a response, at most.
        quantity: what is attributed to neurons.
        rank_by: by what neurons are ranked.
        scope: what neurons compete in.
        budget: what ``reset_fraction`` is a share of.
        calibration: JSONL for the reset, for a rule that finds alpha and for a refit, see
            :func:`lightning_rejuv.checkpoints.dialogues.read_dialogues`.
        device: where models run for those.
        dtype: of the output, one of "float32", "bfloat16", "float16"; by default the SFT model's.
        compute_dtype: in which models are run for those; ``"auto"`` is bfloat16 where the device's hardware
            multiplies in it and float32 elsewhere, and the report says which it was.
        rounding: to half types, ``"stochastic"``, so that small changes survive on average, or ``"nearest"``.
        seed: of stochastic rounding, sampling, the random control and the order of a refit.
        refit: a few plain training steps after the edit, on the calibration data and the base's own samples.
        progress: called with the name of each phase, how much of it is done, and how much there is to do (bytes
            of weights, forward passes or tokens).

    Returns:
        The report, which stands in the output as ``rejuvenation.json`` too. What is warned of on the way is raised as
        a warning and stands in its ``warnings``.

    Raises:
        ValueError: an argument, a file or a pair of checkpoints that cannot be fused. Nothing is written.
        FileExistsError: the output exists.
        OSError: reading or writing failed, or the disk is full; nothing is left under the output's name.

    Example: fusion alone.

        >>> import tempfile, torch
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
    asked = Options(
        alpha=alpha,
        reset_fraction=reset_fraction,
        omega=omega,
        positions=positions,
        positions_per_response=positions_per_response,
        quantity=quantity,
        rank_by=rank_by,
        scope=scope,
        budget=budget,
        rounding=rounding,
        seed=seed,
        refit=refit,
    )
    beside = {"calibration": calibration, "device": device, "dtype": dtype, "compute_dtype": compute_dtype}
    check_options(asked, beside)
    loads = asked.runs_the_model
    if loads:
        compute_dtype = beside["compute_dtype"] = compute_dtype_on(device, compute_dtype)
    base, sft, out = (Path(path).expanduser() for path in (base, sft, out))
    check_free(out)
    check_apart(out, base, sft)
    if (sft / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{str(sft)!r} is an adapter: use `rejuvenate_adapter`, or for a reset, a search or a refit merge it first "
            "(`merge_adapter(base, sft, out, alpha=1)`) and pass the merged model."
        )

    ours, theirs = open_checkpoint(sft, "SFT model"), open_checkpoint(base, "base")
    check_fusable(ours, "SFT model")
    check_fusable(theirs, "base")
    warnings = [*check_same_architecture(ours, theirs), *links_out(sft)]
    warnings += [*left_out(ours, "SFT model"), *left_out(theirs, "base")]
    pairing = pair_up(ours, theirs)
    check_differ(pairing)
    ours, theirs = pairing.sft, pairing.base
    warnings += [*pairing.warnings, *a_second_time(find_record(ours, theirs)[0])]
    fused = [pair.name for pair in pairing.pairs.values() if pair.base is not None]
    given = 1.0 if isinstance(asked.alpha, str) else asked.alpha
    recipe = Recipe(
        alpha_by_name(given, fused),
        DTYPES[dtype] if dtype else None,
        asked.rounding == "stochastic",
        asked.seed,
        omega=asked.omega,
    )
    check_seed(asked, dtypes := output_dtypes(ours, recipe.dtype).values())
    size = output_size(ours, recipe.dtype)
    check_room(out, size + sidecar_size(sft))

    with ExitStack() as stack:
        stack.enter_context(reporting(progress))
        told = stack.enter_context(collecting_warnings())
        partial = stack.enter_context(new_directory(out))
        hasher = stack.enter_context(Hasher({"base": _files(theirs), "sft": _files(ours)}))
        attribution = refitted = None
        if loads:
            from lightning_rejuv.checkpoints.reset import plan_on_disk

            scratch = partial / "scratch"
            scratch.mkdir()
            assert calibration is not None
            plan = plan_on_disk(
                ours,
                theirs,
                pairing,
                asked,
                Path(calibration).expanduser(),
                device,
                DTYPES[compute_dtype],
                scratch,
            )
            shutil.rmtree(scratch)
            recipe = replace(recipe, resets=plan.resets, moves=plan.moves)
            if plan.alpha is not None:
                given = plan.alpha
                recipe = replace(recipe, alphas=dict.fromkeys(fused, given))
            attribution, refitted = plan.attribution, plan.refit
            warnings += plan.warnings
        with FileWriter(partial) as writer:
            stream = FusionStream(ours, theirs, pairing.pairs, recipe)
            stream.write(writer)
        report = CheckpointReport(
            version=__version__,
            output=str(out),
            form="model",
            inputs={
                role: {"path": str(path), "sha256": hasher.digests()[role]}
                for role, path in (("base", base), ("sft", sft))
            },
            outputs=writer.digests,
            options=applied(asked, beside, dtypes),
            alpha=given,
            tensors=stream.measured,
            vocabulary=_vocabulary(pairing),
            unused=pairing.unused,
            warnings=(*warnings, *told),
            reset={name: pattern.count for name, pattern in recipe.resets.items()},
            attribution=attribution,
            refit=refitted,
        )
        _write_beside(partial, ours, recipe, size, report)
    return report


def _write_beside(
    partial: Path, sft: Checkpoint, recipe: Recipe, size: int, report: CheckpointReport
) -> None:
    copy_sidecar(sft.path, partial, recipe.dtype)
    if sft.index is not None:
        same = recipe.dtype is None and not sft.renamed
        write_file(partial / INDEX, index_bytes(sft.path) if same else new_index(sft.index, size))
    write_report(partial, sft.path, report)


def _vocabulary(pairing: Pairing) -> dict[str, int] | None:
    rows = pairing.rows
    if rows is None or rows.identity:
        return None
    return {"shared": rows.shared, "moved": rows.moved, "new in the SFT model": rows.new}


def _files(checkpoint: Checkpoint) -> tuple[Path, list[str]]:
    return checkpoint.path, list(checkpoint.shards)
