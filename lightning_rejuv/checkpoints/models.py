"""Loading with transformers, in one place: local files alone, no code of the checkpoint's own, no pickles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_rejuv._compat import require
from lightning_rejuv.anchor.config import configs
from lightning_rejuv.anchor.files import CONFIG, read_json
from lightning_rejuv.progress import phase

# How many layers, blocks or experts: each is an object in memory, also of a model without weights.
_COUNT = re.compile(r"(?:layer|block|expert)s?$")
_MAX_COUNT = 10_000


class CustomCode(ValueError):
    """A checkpoint cannot be loaded without code that it brings along, which is never run."""


def from_local(auto: Any, directory: Path, **options: Any) -> Any:
    """Load a config, a tokenizer or a model of transformers from a directory.

    Every load of this package comes through here: nothing is downloaded, no code that the directory holds or names
    is run, and nobody is asked whether it should be.

    Args:
        auto: the class, for example ``transformers.AutoTokenizer``.
        directory: of the checkpoint.
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
    """Load a config from local files; which kernels are used is not the checkpoint's to say.

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
    require("transformers", "A model to be run")
    from transformers import AutoModelForCausalLM

    with phase("loading the model", 1):
        model, info = from_local(
            AutoModelForCausalLM,
            directory,
            config=load_config(directory),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"Expected {str(directory)!r} to hold every tensor of {type(model).__name__} but it lacks "
            f"{missing[:8]}."
        )
    return model.to(device).eval()  # type: ignore[no-any-return]


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer from local files.

    Raises:
        ValueError: there is none, or it needs code of its own.
    """
    require("transformers", "Calibration data")
    from transformers import AutoTokenizer

    try:
        return from_local(AutoTokenizer, directory)
    except CustomCode:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected a tokenizer in {str(directory)!r} to read calibration data with but it cannot be "
            f"loaded ({error}). Save the SFT model's tokenizer beside it."
        ) from error


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
