"""The output directory, which appears whole or not at all, and the files that it has beside the weights."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_rejuv.anchor.files import ADAPTER_CONFIG, CONFIG, INDEX
from lightning_rejuv.anchor.links import lies_within
from lightning_rejuv.names import listing

REPORT = "rejuvenation.json"
RECIPE = "rejuvenation.yaml"
CARD = "README.md"

# Weights in any form, and what a trainer leaves for its own resumption. Every other file is copied.
_LEFT_BEHIND = re.compile(
    r"\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|pkl|npz|distcp|part)$"
    r"|\.(?:safetensors|bin|h5)\.index\.json$"
    r"|^(?:trainer_state|all_results|train_results|eval_results)\.json$"
    r"|^(?:rejuvenation\.(?:json|yaml)|README\.md|latest|zero_to_fp32\.py|training_args\..*)$|^\."
)
_FOLDERS = ("additional_chat_templates",)
# Opens a directory, never through a link, and never waits: a FIFO is no directory.
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Give a directory to write into; on exit it gets its final name in one atomic step.

    What is written goes into ``.NAME.partial`` beside it, under a lock that ends with the process. After an
    error it is removed; after a kill it stays, and the next run for the same name removes it. A link at that name,
    or anything else that is no directory of the same user, is neither followed nor removed. Whoever writes a file
    has to sync it; this function syncs the directories.

    Args:
        final: the name that the directory gets; it must not exist, or be an empty directory.

    Raises:
        FileExistsError: the name is taken; or something else stands at the partial directory's name.
        BlockingIOError: another process is writing the same output right now.
        OSError: the directory cannot be written.
    """
    final = final.absolute()
    check_free(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    lock = _claim(partial)
    try:
        try:
            yield partial
            _sync(lock)
            _check_same(partial, lock)
            os.rename(partial, final)
            parent = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        except BaseException:
            _remove(partial, final, lock)
            raise
    finally:
        os.close(lock)


def check_free(final: Path) -> None:
    """Refuse an output name that is taken.

    Raises:
        FileExistsError: it exists and is not an empty directory.
    """
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise FileExistsError(
            f"Expected the output {str(final)!r} not to exist but it does. Nothing is ever overwritten: "
            "remove it or choose another name."
        )


def _claim(partial: Path) -> int:
    """Create the partial directory, emptied of what a killed run left, and return its locked descriptor."""
    while True:
        created = True
        try:
            os.mkdir(partial)
        except FileExistsError:
            created = False
        try:
            descriptor = os.open(partial, OPEN_DIRECTORY)
        except FileNotFoundError:  # its former owner has just renamed it
            continue
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise _taken(partial, "a link or a file") from error
        locked = False
        try:
            if not created and os.fstat(descriptor).st_uid != os.geteuid():
                raise _taken(partial, "another user's directory")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"Another process is writing into {str(partial)!r}: wait for it, or choose another output."
                ) from None
            locked = True
            # Between opening and locking, its former owner may have renamed it to the final name.
            if _is_same(partial, descriptor):
                _empty(descriptor)
                return descriptor
        except BaseException:
            if locked and created and _is_same(partial, descriptor):
                os.rmdir(partial)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _taken(partial: Path, what: str) -> FileExistsError:
    return FileExistsError(
        f"Expected {str(partial)!r}, where the output is prepared, not to exist or to be what a run that was "
        f"stopped has left, but it is {what}. Nothing there is touched: remove it, or choose another output."
    )


def _is_same(path: Path, descriptor: int) -> bool:
    """Tell whether a path, itself no link, is the directory that is open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check_same(partial: Path, lock: int) -> None:
    if not _is_same(partial, lock):
        raise OSError(f"{str(partial)!r} was moved or replaced while the output was written into it.")


def _remove(partial: Path, final: Path, lock: int) -> None:
    """Empty the directory, even if an interrupt or an error comes in between; then remove it, under either name."""
    try:
        _empty(lock)
    except BaseException:  # a second Ctrl-C, or an error of the disk: once more, as far as it goes
        with contextlib.suppress(OSError):
            _empty(lock)
    for path in (partial, final):
        with contextlib.suppress(OSError):
            if _is_same(path, lock):
                os.rmdir(path)


def _empty(folder: int) -> None:
    """Remove everything in a directory that is open; links are removed and never followed."""
    for name in os.listdir(folder):
        try:
            inner = os.open(name, OPEN_DIRECTORY, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            os.unlink(name, dir_fd=folder)
            continue
        try:
            _empty(inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=folder)


def _sync(folder: int) -> None:
    """Wait until a directory that is open, and those in it, are on the disk."""
    with os.scandir(folder) as entries:
        inside = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in inside:
        inner = os.open(name, OPEN_DIRECTORY, dir_fd=folder)
        try:
            _sync(inner)
        finally:
            os.close(inner)
    os.fsync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a small new file and wait until it is on the disk; a link that stands at its name is not followed."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sidecar_files(directory: Path) -> list[Path]:
    """Return the files beside the weights that the output takes over: config, tokenizer, chat template and the like.

    Returns:
        Their names, relative to the directory, sorted. Links that lead out of it are not among them, see
        :func:`links_out`.
    """
    return [
        name for name in _beside(directory) if (directory / name).is_file() and lies_within(directory, name)
    ]


def links_out(directory: Path) -> list[str]:
    """Return a sentence, for the report, on links and special files that are not copied.

    Raises:
        ValueError: one of them stands in the place of the config, without which the output would be no checkpoint.
    """
    out = [
        str(name)
        for name in _beside(directory)
        if not ((directory / name).is_file() and lies_within(directory, name))
        and ((directory / name).is_symlink() or not (directory / name).is_dir())
    ]
    for name in (CONFIG, ADAPTER_CONFIG, INDEX):
        if os.path.lexists(directory / name) and not lies_within(directory, name):
            raise ValueError(
                f"Expected {name} in {str(directory)!r} to lie there but it is a link that leads out of the "
                "checkpoint. Put a copy in its place."
            )
    if not out:
        return []
    return [
        f"not copied from {str(directory)!r}, because they are no files or links that lead out of it: {listing(out)}"
    ]


def _beside(directory: Path) -> list[Path]:
    names = [Path(f.name) for f in directory.iterdir() if not _LEFT_BEHIND.search(f.name)]
    for folder in _FOLDERS:
        if (directory / folder).is_dir() and lies_within(directory, folder):
            names += [Path(folder, f.name) for f in (directory / folder).iterdir()]
    return sorted(names)


def copy_sidecar(
    source: Path, target: Path, dtype: torch.dtype | None, without: tuple[str, ...] = ()
) -> None:
    """Copy the files beside the weights, byte for byte.

    Args:
        source: the checkpoint that they belong to.
        target: the directory that they are copied into.
        dtype: of the output if it is another than the checkpoint's; ``config.json`` then says so.
        without: names that are left out, for example because the target holds them already.
    """
    for file in sidecar_files(source):
        if str(file) in (*without, ADAPTER_CONFIG):
            continue
        content = (source / file).read_bytes()
        if str(file) == CONFIG and dtype is not None:
            content = _with_dtype(content, dtype)
        (target / file).parent.mkdir(exist_ok=True)
        write_file(target / file, content)


def new_index(index: dict[str, Any], total_bytes: int) -> bytes:
    """Return the content of an index file for the same tensors in the same shards, with another total size."""
    metadata = index.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total_bytes}
    return (json.dumps({**index, "metadata": metadata}, indent=2) + "\n").encode()


def index_bytes(directory: Path) -> bytes:
    """Return the content of a checkpoint's index file."""
    return (directory / INDEX).read_bytes()


def sidecar_size(directory: Path) -> int:
    """Return how many bytes the files beside the weights have."""
    return sum(os.stat(directory / file).st_size for file in sidecar_files(directory))


def _with_dtype(content: bytes, dtype: torch.dtype) -> bytes:
    config = json.loads(content)
    name = str(dtype).removeprefix("torch.")
    _rename_dtype(config, name)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _rename_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict) and key.endswith("_config"):
            _rename_dtype(value, name)
