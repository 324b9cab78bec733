"""The model that transformers makes of a config; no weight is allocated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv._compat import require
from lightning_rejuv.anchor.conversion import sources
from lightning_rejuv.checkpoints.checkpoint import CONFIG, Checkpoint, read_json
from lightning_rejuv.checkpoints.models import CustomCode, load_config


def skeleton(directory: Path) -> Any | None:
    """Return transformers' model of a config, on the meta device; None where transformers has none.

    Raises:
        ImportError: transformers is not installed.
        CustomCode: the config needs code of its own.
        ValueError: the config does not make a model.
    """
    transformers = require("transformers", "The architecture")

    kind = read_json(directory / CONFIG).get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    try:
        config = load_config(directory)
        cls = getattr(transformers, next(iter(config.architectures or []), ""), None)
        # A config may name anything that transformers has: only a model of its own kind is built.
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            cls = None
        if cls is None and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return None
        with torch.device("meta"):
            model = cls(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
    except CustomCode:
        raise
    except Exception as error:  # whatever a config with a wrong value leads to
        raise ValueError(f"config.json does not make a {kind} model: {error}") from error
    return model


def loads(model: Any, checkpoint: Checkpoint, names: list[str] | None = None) -> dict[str, set[str]]:
    """Find what would be wrong if transformers loaded a checkpoint, from its names and shapes.

    Args:
        model: from :func:`skeleton`.
        checkpoint: the files.
        names: what their tensors are called, in the files' order, if not what the files say.

    Returns:
        Names: ``"missing"`` and ``"shapes"`` by the names in memory, ``"unused"`` by those on disk.
    """
    stored = dict(zip(names or checkpoint.place, checkpoint.place, strict=True))
    there = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = set(there) - set(model.all_tied_weights_keys)
    fine = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = {name for name in missing if not any(re.search(pattern, name) for pattern in fine)}
    shapes, unused = set[str](), set[str]()
    for source in sources(model, stored):
        if source.target not in there:
            unused.update(source.names)
            continue
        try:
            found = source.tensors(
                lambda name: torch.empty(checkpoint.entry(stored[name]).shape, device="meta")
            )
        except ValueError:
            shapes.add(source.target)
            continue
        missing -= found.keys()
        shapes |= {n for n, tensor in found.items() if n in there and tensor.shape != there[n]}
    return {"missing": missing, "shapes": shapes, "unused": unused}


def missing_names(checkpoint: Checkpoint) -> set[str]:
    """Return the names in memory that a checkpoint leaves random; none where transformers cannot tell."""
    try:
        model = skeleton(checkpoint.path)
    except (ImportError, ValueError):
        return set()
    return set() if model is None else loads(model, checkpoint)["missing"]


def names_on_disk(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names on disk by those in memory, of tensors that loading only renames; none where unknown."""
    try:
        model = skeleton(checkpoint.path)
    except (ImportError, ValueError):
        return {}
    found = sources(model, checkpoint.place) if model is not None else []
    return {source.target: source.names[0] for source in found if source.converter is None}
