"""How far SFT has gone, whether it went too far, and which alpha fits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning_rejuv.alpha.search import USUAL_ALPHA
from lightning_rejuv.anchor.files import read_json
from lightning_rejuv.checkpoints.adapter import is_adapter
from lightning_rejuv.checkpoints.checks import (
    Finding,
    check_ends,
    check_generation,
    check_tokenizer,
    check_tying,
    check_vocabulary,
    end_tokens,
)
from lightning_rejuv.checkpoints.device import check_compute_dtype, check_device, compute_dtype_on
from lightning_rejuv.checkpoints.diagnosis import Diagnosis, recommend, verdict_on
from lightning_rejuv.checkpoints.options import check_no_model_is_run
from lightning_rejuv.checkpoints.pairing import Pairing, check_same_architecture, pair_up
from lightning_rejuv.checkpoints.reader import Checkpoint, PathLike, check_fusable, left_out, open_checkpoint
from lightning_rejuv.checkpoints.record import find_record
from lightning_rejuv.checkpoints.stream import DTYPES, FusionStream, Recipe
from lightning_rejuv.progress import Listener, reporting
from lightning_rejuv.verifier import check_verifier
from lightning_rejuv.warned import collecting_warnings


def diagnose_checkpoint(
    base: PathLike,
    sft: PathLike,
    calibration: PathLike | None,
    verifier: str | Callable[[str, str], object] | None,
    beside: Mapping[str, str],
    progress: Listener | None,
) -> Diagnosis:
    """Do what :func:`lightning_rejuv.checkpoints.diagnose` says.

    Args:
        base: directory of the checkpoint that SFT started from.
        sft: directory of the SFT model.
        calibration: JSONL; None if no model is to be run.
        verifier: a function of prompt and response, or ``"module:function"``.
        beside: ``device`` and ``compute_dtype``.
        progress: called with phases.
    """
    device, compute_dtype = beside["device"], beside["compute_dtype"]
    check_compute_dtype(compute_dtype)
    check = None
    if calibration is None:
        if verifier is not None:
            raise ValueError("Expected `calibration` with `verifier`: its prompts are what is answered.")
        check_no_model_is_run(beside)
    else:
        check_device(device)
        check = _verifier(verifier)
    if is_adapter(sft):
        raise ValueError(
            f"{str(sft)!r} is an adapter: merge it first (`merge_adapter(base, sft, out, alpha=1)`) and diagnose the "
            "merged model."
        )
    ours, theirs = open_checkpoint(sft, "SFT model"), open_checkpoint(base, "base")
    check_fusable(ours, "SFT model")
    check_fusable(theirs, "base")
    warnings = check_same_architecture(ours, theirs)
    warnings += [*left_out(ours, "SFT model"), *left_out(theirs, "base")]
    pairing = pair_up(ours, theirs)
    ours, theirs = pairing.sft, pairing.base
    read = None
    if calibration is not None:
        from lightning_rejuv.checkpoints.behaviour import measure_behaviour
        from lightning_rejuv.checkpoints.reset import calibration_for

        # Before the weights, which take minutes to read: what is refused is refused at once.
        read = calibration_for(ours, Path(calibration).expanduser())
    stream = FusionStream(ours, theirs, pairing.pairs, Recipe(dict.fromkeys(pairing.pairs, USUAL_ALPHA)))
    behaviour, run_in = None, None
    with reporting(progress), collecting_warnings() as told:
        stream.measure()
        if read is not None:
            run_in = compute_dtype_on(device, compute_dtype)
            with tempfile.TemporaryDirectory(prefix="lightning-rejuv-") as scratch:
                behaviour = measure_behaviour(
                    ours, theirs, pairing, read, check, device, DTYPES[run_in], Path(scratch)
                )
    record, recorded = find_record(ours, theirs)
    findings = [*recorded, *_findings(ours, theirs, pairing), *(check_ends(ours, read) if read else ())]
    same_vocabulary = pairing.rows is None or pairing.rows.identity
    unchanged = same_vocabulary and not any(s.difference for s in stream.measured.values())
    verdict = verdict_on(behaviour)
    recommendation, alpha = recommend(verdict, behaviour, record, unchanged)
    return Diagnosis(
        base=str(base),
        sft=str(sft),
        tensors=stream.measured,
        findings=(
            *findings,
            *(Finding("config", None, text) for text in warnings),
            *(Finding("calibration", None, text) for text in told),
        ),
        behaviour=behaviour,
        verdict=verdict.level,
        reasons=verdict.reasons,
        recommendation=recommendation,
        alpha=alpha,
        rejuvenated=record,
        device=device if run_in else None,
        compute_dtype=run_in,
    )


def _verifier(given: str | Callable[[str, str], object] | None) -> Callable[[str, str], object] | None:
    """Return the verifier that was brought, or named, once it is known that it can be called."""
    if given is None:
        return None
    from lightning_rejuv.verifier import import_verifier

    verifier = import_verifier(given) if isinstance(given, str) else given
    check_verifier(verifier, ("prompt", "response"))
    return verifier


def _findings(sft: Checkpoint, base: Checkpoint, pairing: Pairing) -> list[Finding]:
    findings = [*check_tying(sft), *check_vocabulary(sft), *check_tokenizer(sft), *check_generation(sft)]
    rows = pairing.rows
    if rows is not None and not rows.identity:
        text = f"{rows.shared} tokens shared with the base, {rows.moved} of them moved, {rows.new} new"
        findings.append(Finding("vocabulary", None, text))
    if pairing.unused:
        findings.append(Finding("unused", None, f"{len(pairing.unused)} tensors that only the base has"))
    ours, theirs = _template(sft), _template(base)
    if ours != theirs:
        what = "the SFT model's own" if ours else "lost in SFT: the base has one"
        findings.append(Finding("chat template", bool(ours), what))
    ends = end_tokens(sft), end_tokens(base)
    if ends[0] != ends[1]:
        findings.append(Finding("end of sequence", True, f"EOS ids {ends[0]}, the base's {ends[1]}"))
    return findings


def _template(checkpoint: Checkpoint) -> str | None:
    file, settings = checkpoint.path / "chat_template.jinja", checkpoint.path / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    return None if found is None else str(found)
