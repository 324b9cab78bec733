"""The only place that loads with transformers: local files alone, no code that a checkpoint brings, no pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import require
from lightning_rejuv.anchor.config import configs
from lightning_rejuv.anchor.conversion import sources
from lightning_rejuv.anchor.files import CONFIG, read_json
from lightning_rejuv.checkpoints.reader import Checkpoint
from lightning_rejuv.progress import phase

# How many layers, blocks or experts: each is an object in memory, also of a model without weights.
_COUNT = re.compile(r"(?:layer|block|expert)s?$")
_MAX_COUNT = 10_000


class CustomCode(ValueError):
    """Raised if a checkpoint cannot be loaded without code that it brings along, which is never run."""


def from_local(auto: Any, directory: Path, **options: Any) -> Any:
    """Load a config, a tokenizer or a model of transformers from a directory.

    Every load of this package comes through this function: nothing is downloaded, no code that the directory holds
    or names is run, and nobody is asked whether it should be.

    Args:
        auto: the class, for example ``transformers.AutoTokenizer``.
        directory: the checkpoint.
        options: for its ``from_pretrained``.

    Raises:
        CustomCode: it needs code of its own; the file that says so is named.
        ValueError: its config counts more layers or experts than a model has.
        Exception: whatever transformers raises for files that it cannot read.
    """
    if (directory / CONFIG).is_file():
        _check_counts(directory)
    try:
        return auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CustomCode(
            f"{_naming(directory, auto.__name__)} names custom code for {auto.__name__} (`auto_map`), which is never "
            "run. Use a checkpoint whose classes are transformers' own."
        ) from error


def load_config(directory: Path) -> Any:
    """Load a config from local files, without the kernels that it names.

    A config may name an attention of the Hugging Face Hub, which transformers would download and run.

    Raises:
        CustomCode: it needs code of its own.
    """
    from transformers import AutoConfig

    config = from_local(AutoConfig, directory)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for field in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if getattr(part, field, None) is not None:
                setattr(part, field, None)
    return config


def load_model(directory: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """Load a causal language model from local files, in eval mode.

    Raises:
        ValueError: transformers does not know it, it needs code of its own, or tensors are missing.
        ImportError: transformers is not installed.
    """
    transformers = require("transformers", "A model to be run")
    with phase("loading the model", 1):
        model, info = from_local(
            transformers.AutoModelForCausalLM,
            directory,
            config=load_config(directory),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"Expected {str(directory)!r} to hold every tensor of {type(model).__name__} but it lacks {missing[:8]}."
        )
    return model.to(device).eval()  # type: ignore[no-any-return]


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer from local files.

    Raises:
        ValueError: the directory holds none, or it needs code of its own.
    """
    transformers = require("transformers", "Calibration data")
    try:
        return from_local(transformers.AutoTokenizer, directory)
    except CustomCode:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected a tokenizer in {str(directory)!r} to read calibration data with but it cannot be loaded "
            f"({error}). Save the SFT model's tokenizer beside it."
        ) from error


def skeleton(directory: Path) -> Any | None:
    """Return the model that transformers makes of a config, without weights, on the meta device.

    Returns:
        None if transformers has no model for the config.

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


def skeleton_if_known(directory: Path) -> Any | None:
    """Return :func:`skeleton`; None also if transformers is not installed, or cannot make a model of the config."""
    try:
        return skeleton(directory)
    except (ImportError, ValueError):
        return None


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
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = set(expected) - set(model.all_tied_weights_keys)
    fine = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = {name for name in missing if not any(re.search(pattern, name) for pattern in fine)}
    shapes, unused = set[str](), set[str]()
    for source in sources(model, stored):
        if source.target not in expected:
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
        shapes |= {n for n, tensor in found.items() if n in expected and tensor.shape != expected[n]}
    return {"missing": missing, "shapes": shapes, "unused": unused}


def missing_names(checkpoint: Checkpoint) -> set[str]:
    """Return the names in memory that a checkpoint leaves random; none if transformers cannot tell."""
    model = skeleton_if_known(checkpoint.path)
    return set() if model is None else loads(model, checkpoint)["missing"]


def names_on_disk(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names on disk by those in memory, of tensors that loading only renames; none if unknown."""
    model = skeleton_if_known(checkpoint.path)
    found = sources(model, checkpoint.place) if model is not None else []
    return {source.target: source.names[0] for source in found if source.converter is None}


def to_disk_layout(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model's parameters as ``save_pretrained`` would store them.

    Fused experts are taken apart, renamed weights get their name on disk, transposed ones are turned back.
    This works for masks and for tensors without data, too: layouts differ by permutations only.
    """
    from transformers import core_model_loading

    return dict(core_model_loading.revert_weight_conversion(model, dict(state)))


def _check_counts(directory: Path) -> None:
    for part in configs(read_json(directory / CONFIG)):
        for key, value in part.items():
            if _COUNT.search(key) and isinstance(value, (int, float)) and value > _MAX_COUNT:
                raise ValueError(
                    f"Expected `{key[:100]}` in {str(directory / CONFIG)!r} to be at most {_MAX_COUNT} but got "
                    f"{value!r:.100}."
                )


def _naming(directory: Path, auto: str) -> str:
    """Return the file that names code for a class, for a message."""
    for name in ("tokenizer_config.json", "config.json"):
        try:
            table = json.loads((directory / name).read_bytes()).get("auto_map")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if (isinstance(table, dict) and auto in table) or (isinstance(table, list) and "token" in name):
            return repr(str(directory / name))
    return repr(str(directory))
