"""Loading a checkpoint as a model, for what cannot be known from the weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_rejuv._compat import require


def load_model(directory: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """Load a causal language model from local files, in eval mode.

    Raises:
        ValueError: transformers does not know it, or tensors are missing.
        ImportError: transformers is not installed.
    """
    require("transformers", "A model to be run")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, output_loading_info=True
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
        ValueError: there is none.
    """
    require("transformers", "Calibration data")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected a tokenizer in {str(directory)!r} to read calibration data with but it cannot be "
            "loaded "
            f"({error}). Save the SFT model's tokenizer beside it."
        ) from error
