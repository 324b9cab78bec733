"""What running the SFT model says is to be done to its checkpoint: alpha, the reset, and what a refit moves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.anchor import Anchor, match
from lightning_rejuv.anchor.config import context_length, vocabulary_size
from lightning_rejuv.anchor.files import GENERATION, INDEX
from lightning_rejuv.attribution.selection import count_of
from lightning_rejuv.checkpoints.checks import check_ends
from lightning_rejuv.checkpoints.dialogues import Calibration, read_calibration
from lightning_rejuv.checkpoints.disk_names import Pattern, moves_on_disk, on_disk
from lightning_rejuv.checkpoints.models import load_model, load_tokenizer
from lightning_rejuv.checkpoints.output import write_file
from lightning_rejuv.checkpoints.pairing import Pair, Pairing
from lightning_rejuv.checkpoints.reader import Checkpoint
from lightning_rejuv.checkpoints.sidecar import copy_sidecar
from lightning_rejuv.checkpoints.stream import Edit, FusionStream
from lightning_rejuv.checkpoints.writer import FileWriter
from lightning_rejuv.config import Options
from lightning_rejuv.data import Data
from lightning_rejuv.make_plan import make_plan
from lightning_rejuv.plan import Plan
from lightning_rejuv.progress import phase
from lightning_rejuv.refit import RefitReport
from lightning_rejuv.report.layers import by_layer
from lightning_rejuv.weights.open_targets import open_targets


@dataclass(frozen=True)
class DiskPlan:
    """What a loaded model says is to be done to its checkpoint.

    Attributes:
        alpha: the alpha that was found; None if it was given.
        resets: the weights to reset, by name on disk.
        attribution: how they were chosen, in numbers.
        moves: what a refit adds, by name on disk.
        refit: what its steps did; None without one.
        warnings: what the calibration data say of the checkpoint.
    """

    alpha: float | None
    resets: Mapping[str, Pattern]
    attribution: dict[str, Any]
    moves: Mapping[str, Tensor]
    refit: RefitReport | None
    warnings: tuple[str, ...] = ()


def plan_on_disk(
    pairing: Pairing,
    options: Options,
    calibration: Path,
    device: str,
    dtype: torch.dtype,
    scratch: Path,
) -> DiskPlan:
    """Load the SFT model, attribute, select, and find the selected neurons on disk.

    Args:
        pairing: the SFT model and its base.
        options: what is asked for: alpha, the reset and the refit.
        calibration: JSONL, see :func:`~lightning_rejuv.checkpoints.dialogues.read_dialogues`.
        device: the device that models are run on.
        dtype: the dtype that they are run in.
        scratch: an empty directory for a copy of the base in the SFT model's layout, if one is needed.

    Raises:
        ValueError: what :func:`lightning_rejuv.rejuvenate` refuses, or a neuron that has no place on disk.
    """
    sft = pairing.sft
    # Before the model, which takes minutes to load: a line that is refused is refused at once.
    read = calibration_for(sft, calibration)
    model = load_model(loadable(sft, scratch), device, dtype)
    targets = open_targets(model, anchor_for(model, pairing, dtype, scratch))
    plan, findings = make_plan(model, targets, Data(read.batches), options)
    neurons = sum(reset.group.count for reset in plan.resets)
    found: dict[str, Any] = {
        "calibration": str(calibration),
        "dialogues": sum(len(batch["input_ids"]) for batch in read.batches),
        "neurons": neurons,
        "neurons_asked": count_of(options.reset.fraction, neurons)
        if options.reset and options.reset.budget == "share"
        else None,
        "neurons_reset": sum(len(reset.index) for reset in plan.resets),
        "neurons_by_layer": by_layer((r.group.layer, r.group.kind, len(r.index)) for r in plan.resets),
        "search": findings.search,
    }
    if findings.comparison and findings.attribution:
        found["positions"] = findings.attribution.positions
        if findings.attribution.reconstructs:
            found["reconstruction_error"] = findings.attribution.error
    if findings.comparison:
        found["entropy_sft"] = findings.comparison.entropy_sft
        found["entropy_base"] = findings.comparison.entropy_base
    return DiskPlan(
        findings.search.alpha if findings.search else None,
        on_disk(model, sft, masks(model, plan)),
        found,
        moves_on_disk(model, sft, plan.moves) if plan.moves else {},
        findings.refit,
        tuple(finding.detail for finding in check_ends(sft, read)),
    )


def calibration_for(sft: Checkpoint, calibration: Path) -> Calibration:
    """Read calibration data with the SFT model's tokenizer.

    Raises:
        ValueError: a line is malformed, too long or of tokens that the model lacks, or there is no tokenizer.
        OSError: the file cannot be read.
    """
    return read_calibration(
        calibration, load_tokenizer(sft.path), context_length(sft.config), vocabulary_size(sft.config)
    )


def masks(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return the neurons that a plan resets as masks of the model's parameters."""
    selected: dict[str, Tensor] = {}
    for name, parts in plan.parts().items():
        selected[name] = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        for group, dim, index in parts:
            group.matrix(selected[name]).index_fill_(dim, index.cpu(), True)
    return selected


def loadable(sft: Checkpoint, scratch: Path) -> Path:
    """Return the directory of the SFT model, or if it was renamed, of a copy under names that load."""
    if not sft.renamed:
        return sft.path
    _write(sft, sft, {name: Pair(name, None) for name in sft.place}, scratch / "sft")
    return scratch / "sft"


def anchor_for(model: nn.Module, pairing: Pairing, dtype: torch.dtype, scratch: Path) -> Anchor:
    """Open the base's files if transformers would load them into the model, else a copy that it would load."""
    sft, base = pairing.sft, pairing.base
    anchor = Anchor.open(base.path).read_as(model)
    try:
        match(model, anchor)
        plain = pairing.rows is None or pairing.rows.identity
    except ValueError:
        plain = False
    if plain:
        return anchor
    # The base with the SFT model's names, vocabulary and tying: a fusion with alpha 0.
    _write(sft, base, pairing.pairs, scratch / "base", without=(GENERATION,))
    ends: list[int] = list(anchor.end_tokens)
    content = {"eos_token_id": pairing.rows.of_sft(ends) if pairing.rows else ends}
    write_file(scratch / "base" / GENERATION, json.dumps(content).encode())
    return Anchor.open(load_model(scratch / "base", "cpu", dtype))


def _write(
    sft: Checkpoint, base: Checkpoint, pairs: Mapping[str, Pair], target: Path, without: tuple[str, ...] = ()
) -> None:
    """Write what the SFT model's names stand for in the base, or in itself if they have no pair.

    The SFT model's own files are copied beside it, but those ``without``.
    """
    target.mkdir()
    with FileWriter(target) as writer, phase(f"copying the {target.name} to scratch", sft.nbytes):
        FusionStream(sft, base, pairs, Edit(dict.fromkeys(pairs, 0.0))).write(writer)
    copy_sidecar(sft.path, target, None, without)
    if sft.index is not None:
        write_file(target / INDEX, json.dumps(sft.index).encode())
