"""Which tensors, of which shape, transformers expects on disk for a config; no weight is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_rejuv._compat import require
from lightning_rejuv.handoff.checkpoint import CONFIG, read_json
from lightning_rejuv.handoff.disk_names import to_disk_layout


@dataclass(frozen=True)
class Expected:
    """What a checkpoint directory should hold.

    Attributes:
        model: class of the model.
        shapes: of every tensor, by its name on disk.
        required: those that are not tied to another one.
    """

    model: str
    shapes: dict[str, tuple[int, ...]]
    required: frozenset[str]


def expected_tensors(directory: Path) -> Expected | None:
    """Return what transformers' causal language model of a config stores; None where it has none.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the config does not make a model.
    """
    transformers = require("transformers", "The architecture")

    kind = read_json(directory / CONFIG).get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        cls = getattr(transformers, next(iter(config.architectures or []), ""), None)
        if cls is None and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return None
        with torch.device("meta"):
            model = cls(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a config with a wrong value leads to
        raise ValueError(f"config.json does not make a {kind} model: {error}") from error
    tied = set(model.all_tied_weights_keys)
    state = dict(model.state_dict())
    required = to_disk_layout(model, {name: tensor for name, tensor in state.items() if name not in tied})
    everything = to_disk_layout(model, state)
    return Expected(
        type(model).__name__,
        {name: tuple(tensor.shape) for name, tensor in everything.items()},
        frozenset(required),
    )
