"""The weights at the start of a fit as its anchor: written to disk once, found again after a resume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_rejuv.adapters import is_adapted
from lightning_rejuv.anchor.files import hash_file
from lightning_rejuv.anchor.header import build_header
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.open_layout import open_layout


def initial_weights(
    trainer: Trainer, model: nn.Module, record: dict[str, str] | None, *, due_now: bool
) -> tuple[dict[str, str], bool]:
    """Write a model's parameters to disk at the start of a run, or find their file again if the run is resumed.

    Rank zero writes; every rank has to call it.

    Args:
        trainer: the Trainer.
        model: the language model.
        record: what this function returned when the run started; None if it was not called.
        due_now: whether the model is to be rejuvenated before the next update.

    Returns:
        The file's ``path`` and its SHA-256 ``digest``; and whether it is new, and this run's alone.

    Raises:
        MisconfigurationException: the model is at its initial weights and is to be rejuvenated now; it has
            adapters; the log directory is not a local one; or the run is resumed, and the file is gone or has changed.
        OSError: the file could not be written.
    """
    if is_adapted(model):
        raise MisconfigurationException(
            'Expected no adapters with `anchor="init"` but the model has LoRA: its base lies under the adapters. Pass '
            "`anchor=None`."
        )
    if trainer.global_step:
        _check(trainer, record)
        assert record is not None
        return record, False
    if due_now:
        raise MisconfigurationException(
            'Expected a later moment for `anchor="init"`: before the first update the model is its own anchor, and '
            "there is nothing to pull back. Pass the base as `anchor`."
        )
    return _keep(trainer, open_layout(model, trainer.strategy.model))


def forget_initial_weights(trainer: Trainer, record: dict[str, str] | None) -> None:
    """Remove the file, if there is one: after a ``fast_dev_run``, or if the fit is refused."""
    if record is not None and trainer.is_global_zero:
        Path(record["path"]).unlink(missing_ok=True)


def _keep(trainer: Trainer, layout: Layout) -> tuple[dict[str, str], bool]:
    """Write the file, named after its content so that another run does not overwrite it, whole or not at all."""
    logs = str(trainer.log_dir or trainer.default_root_dir)  # a collective, so that every rank asks
    if "://" in logs:
        raise MisconfigurationException(
            f'Expected a local log directory with `anchor="init"`, to keep the initial weights in, but got {logs!r}. '
            "Pass the base as `anchor`, or a logger or `default_root_dir` on this machine."
        )
    directory = Path(logs).absolute()
    wholes = layout.wholes()
    record: dict[str, str] = {}
    new = False
    if trainer.is_global_zero:
        part = directory / f"initial-weights-{os.getpid()}.part"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _write(part, layout, wholes)
            digest = hash_file(part)
            path = directory / f"initial-weights-{digest[:12]}.safetensors"
            new = not path.exists()
            part.replace(path)
            record = {"path": str(path), "digest": digest}
        except OSError as error:
            record = {"error": str(error)}
        finally:
            part.unlink(missing_ok=True)
    for _ in wholes:  # if parameters are sharded all ranks have to go through all of them
        pass
    record = trainer.strategy.broadcast(record)
    if "error" in record:
        raise OSError(f"The initial weights could not be written to {str(directory)!r}: {record['error']}")
    return record, new


def _check(trainer: Trainer, record: dict[str, str] | None) -> None:
    message = ""
    if trainer.is_global_zero:
        if record is None:
            message = "this run did not write them down when it started"
        elif not Path(record["path"]).is_file():
            message = f"their file {record['path']!r} is gone"
        elif hash_file(Path(record["path"])) != record["digest"]:
            message = f"their file {record['path']!r} has changed: its SHA-256 is not {record['digest']}"
    message = trainer.strategy.broadcast(message)
    if message:
        raise MisconfigurationException(
            f'Expected the initial weights of the resumed run for `anchor="init"` but {message}. Pass the path of '
            "these weights as `anchor`, or start the run again."
        )


def _write(path: Path, layout: Layout, wholes: Iterator[tuple[str, Tensor]]) -> None:
    entries = [(name, layout.parameters[name].dtype, tuple(shape)) for name, shape in layout.shapes.items()]
    header = build_header(entries, {"format": "pt"})
    offsets, end = {}, len(header)
    for name, dtype, shape in entries:
        offsets[name] = end
        end += torch.Size(shape).numel() * dtype.itemsize
    path.unlink(missing_ok=True)  # a file of a run that was killed; of a link the link itself
    with path.open("xb") as file:
        file.write(header)
        file.truncate(end)
        for name, tensor in wholes:  # in the layout's order
            file.seek(offsets[name])
            # A copy: numpy would pin the memory of a shard that FSDP has to give back.
            flat = tensor.detach().to("cpu", layout.parameters[name].dtype, copy=True).reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
