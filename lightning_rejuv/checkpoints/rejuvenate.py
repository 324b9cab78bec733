"""From two checkpoints on disk to one that any RL trainer starts from."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lightning_rejuv import __version__
from lightning_rejuv.anchor.files import ADAPTER_CONFIG
from lightning_rejuv.checkpoints.options import Running, applied, check_options, check_seed
from lightning_rejuv.checkpoints.output import check_apart, check_free, check_room, new_directory
from lightning_rejuv.checkpoints.pairing import Pairing, check_differ, open_both, pair_up
from lightning_rejuv.checkpoints.reader import Checkpoint
from lightning_rejuv.checkpoints.record import a_second_time, find_record
from lightning_rejuv.checkpoints.report import CheckpointReport, write_report
from lightning_rejuv.checkpoints.sidecar import copy_sidecar, links_out, sidecar_size, write_index
from lightning_rejuv.checkpoints.stream import DTYPES, Edit, FusionStream, output_dtypes, output_size
from lightning_rejuv.checkpoints.writer import FileWriter, Hasher
from lightning_rejuv.config import Options, PathLike, alpha_by_name
from lightning_rejuv.progress import Listener, reporting
from lightning_rejuv.warned import collecting_warnings


def rejuvenate(
    base: PathLike,
    sft: PathLike,
    out: PathLike,
    asked: Options,
    running: Running,
    dtype: str | None,
    hashes: bool,
    progress: Listener | None,
) -> CheckpointReport:
    """Do what :func:`lightning_rejuv.checkpoints.rejuvenate_checkpoint` says.

    Args:
        base: directory of the checkpoint that SFT started from.
        sft: directory of the SFT model.
        out: directory to write; it must not exist.
        asked: the options of the method.
        running: how models are run.
        dtype: the output's; None for the SFT model's.
        hashes: whether inputs and output are hashed.
        progress: called with phases.
    """
    check_options(asked, running, dtype)
    loads = asked.runs_the_model
    if loads:
        running = replace(running, compute_dtype=running.run_in())
    base, sft, out = (Path(path).expanduser() for path in (base, sft, out))
    check_free(out)
    check_apart(out, base, sft)
    if (sft / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{str(sft)!r} is an adapter: use `rejuvenate_adapter`, or for a reset, a search or a refit merge it first "
            "(`merge_adapter(base, sft, out, alpha=1)`) and pass the merged model."
        )

    *opened, warnings = open_both(sft, base)
    warnings += links_out(sft)
    pairing = pair_up(*opened)
    check_differ(pairing)
    own, anchor = pairing.sft, pairing.base
    warnings += [*pairing.warnings, *a_second_time(find_record(own, anchor)[0])]
    fused = [pair.name for pair in pairing.pairs.values() if pair.base is not None]
    given = 1.0 if isinstance(asked.alpha, str) else asked.alpha
    edit = Edit(
        alpha_by_name(given, fused),
        DTYPES[dtype] if dtype else None,
        asked.rounding == "stochastic",
        asked.seed,
        omega=asked.reset.omega if asked.reset else 0.0,
    )
    check_seed(asked, dtypes := output_dtypes(own, edit.dtype).values())
    size = output_size(own, edit.dtype)
    check_room(out, size + sidecar_size(sft))

    with ExitStack() as stack:
        stack.enter_context(reporting(progress))
        told = stack.enter_context(collecting_warnings())
        partial = stack.enter_context(new_directory(out))
        inputs = {"base": _files(anchor), "sft": _files(own)}
        hasher = stack.enter_context(Hasher(partial, inputs, inputs, hashes))
        attribution = refitted = None
        if loads:
            from lightning_rejuv.checkpoints.plan_on_disk import plan_on_disk

            scratch = partial / "scratch"
            scratch.mkdir()
            plan = plan_on_disk(
                pairing,
                asked,
                Path(running.calibration or "").expanduser(),  # there is one: it was looked at
                running.device,
                DTYPES[running.compute_dtype],
                scratch,
            )
            shutil.rmtree(scratch)
            edit = replace(edit, resets=plan.resets, moves=plan.moves)
            if plan.alpha is not None:
                given = plan.alpha
                edit = replace(edit, alphas=dict.fromkeys(fused, given))
            attribution, refitted = plan.attribution, plan.refit
            warnings += plan.warnings
        with FileWriter(partial, hashes) as writer:
            seen = hasher.seen("sft"), hasher.seen("base")
            stream = FusionStream(own, anchor, pairing.pairs, edit, seen=seen)
            stream.write(writer)
        report = CheckpointReport(
            version=__version__,
            output=str(out),
            form="model",
            inputs=hasher.report(),
            outputs=writer.digests,
            options={**applied(asked, running, dtype, dtypes), "hashes": hashes},
            alpha=given,
            tensors=stream.measured,
            vocabulary=_vocabulary(pairing),
            unused=pairing.unused,
            warnings=(*warnings, *told),
            reset={name: pattern.count for name, pattern in edit.resets.items()},
            attribution=attribution,
            refit=refitted,
        )
        copy_sidecar(sft, partial, edit.dtype)
        write_index(own, partial, edit.dtype, size)
        write_report(partial, sft, report)
    return report


def _vocabulary(pairing: Pairing) -> dict[str, int] | None:
    rows = pairing.rows
    if rows is None or rows.identity:
        return None
    return {"shared": rows.shared, "moved": rows.moved, "new in the SFT model": rows.new}


def _files(checkpoint: Checkpoint) -> tuple[Path, list[str]]:
    return checkpoint.path, list(checkpoint.shards)
