"""Fusion of two checkpoints on disk: lightning-rejuv beside a bare streaming lerp and mergekit.

Each contender runs in processes of its own on the same two checkpoints, in turn; the wall time counts from
the start of the process until the result is synced to the disk, the CPU time is that of all its threads and of the
system for them, the peak is of its anonymous memory. The bare lerp reads, fuses and writes tensor by tensor and does
nothing else; the hashed one also hashes what it reads and writes, which no other way to the same digests does with
less. mergekit pins its own versions of other packages, so that it is called by the path of its script:

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    python -m benchmarks.checkpoints --mergekit mergekit/bin/mergekit-yaml
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_rejuv.anchor.header import build_header, read_header

# About 0.5 and 1.8 GB in bfloat16: hidden size, layers, intermediate size, vocabulary.
_SIZES = {"0.5 GB": (1024, 14, 2816, 32000), "1.8 GB": (2048, 16, 5632, 32000)}
_TINY = {"tiny": (128, 2, 256, 1000)}
_HEAD = 64


def write_checkpoint(path: Path, size: tuple[int, int, int, int], seed: int, noise: float = 0.0) -> int:
    """Write a random Llama in bfloat16, or the same one with noise; return its bytes."""
    hidden, layers, inner, vocabulary = size
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    base, drift = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    state = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=base).mul_(0.02)
        if noise:
            weight += torch.randn(shape, generator=drift).mul_(0.02 * noise)
        state[name] = weight.to(torch.bfloat16)
    path.mkdir()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "num_attention_heads": hidden // _HEAD,
        "num_key_value_heads": hidden // _HEAD,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    return sum(weight.nbytes for weight in state.values())


def bare(base: Path, sft: Path, out: Path, hashes: bool = False) -> None:
    """What nothing can do without: read both tensor by tensor, lerp, write, sync; and hash all three."""
    out.mkdir()
    name = "model.safetensors"
    header = read_header(sft / name)
    table = [(entry.name, entry.dtype, entry.shape) for entry in header.entries]
    digests = [hashlib.sha256() for _ in range(3)] if hashes else []
    with (
        safe_open(sft / name, "pt") as own,
        safe_open(base / name, "pt") as anchor,
        open(out / name, "wb", buffering=0) as file,
    ):
        file.write(build_header(table, header.metadata))
        for entry in header.entries:
            tensors = [own.get_tensor(entry.name), anchor.get_tensor(entry.name)]
            tensors.append(torch.lerp(*tensors, 0.5))
            views = [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in tensors]
            for digest, view in zip(digests, views, strict=False):
                digest.update(view)
            file.write(views[-1])
        os.fsync(file.fileno())


def commands(base: Path, sft: Path, out: Path, mergekit: str | None) -> dict[str, list[str]]:
    """Return each contender's command line."""
    command = [sys.executable, "-m", "lightning_rejuv", "rejuvenate", "--quiet", "--alpha", "0.5"]
    rejuv = [*command, "--base", str(base), "--sft", str(sft), "--out", str(out)]
    nearest = [*rejuv, "--rounding", "nearest"]  # as the others round
    paths = [str(base), str(sft), str(out)]
    found = {
        "bare lerp": [sys.executable, "-m", "benchmarks.checkpoints", "--bare", *paths],
        "bare lerp, hashed": [sys.executable, "-m", "benchmarks.checkpoints", "--bare-hashed", *paths],
        "nearest, --no-hash": [*nearest, "--no-hash"],
        "nearest": nearest,
        "stochastic, --no-hash": [*rejuv, "--no-hash"],
        "stochastic": rejuv,
    }
    if mergekit:
        recipe = {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in (base, sft)],
        }
        path = out.with_suffix(".yaml")
        path.write_text(json.dumps(recipe))
        found["mergekit"] = [mergekit, str(path), str(out), "--no-copy-tokenizer"]
    return found


def measure(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return seconds, CPU seconds and the peak of its anonymous memory in MiB."""
    before, started, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line))
            except (OSError, TypeError):
                pass
            time.sleep(0.005)
        os.sync()
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command[0]} failed: {errors.read().decode()[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="path of the mergekit-yaml script; left out without it")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=_SIZES, default=list(_SIZES))
    parser.add_argument("--tiny", action="store_true", help="a checkpoint of 1 MB, once: does it still run?")
    for name in ("--bare", "--bare-hashed"):
        parser.add_argument(name, nargs=3, type=Path, metavar=("BASE", "SFT", "OUT"), help="one, and exit")
    arguments = parser.parse_args()
    if arguments.bare or arguments.bare_hashed:
        bare(*(arguments.bare or arguments.bare_hashed), hashes=bool(arguments.bare_hashed))
        return
    sizes = _TINY if arguments.tiny else {label: _SIZES[label] for label in arguments.sizes}
    count = 1 if arguments.tiny else arguments.runs
    for label, size in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            base, sft, out = root / "base", root / "sft", root / "out"
            nbytes = write_checkpoint(base, size, 0)
            write_checkpoint(sft, size, 0, noise=0.1)
            os.sync()
            results: dict[str, list[tuple[float, float, float]]] = {}
            for run in range(count + 1):
                for who, command in commands(base, sft, out, arguments.mergekit).items():
                    result = measure(command)
                    if run:  # the first round fills the page cache
                        results.setdefault(who, []).append(result)
                    shutil.rmtree(out)
            print(f"{label} ({nbytes / 1e9:.3f} GB), median of {count}")
            floor: list[float] = []
            for who, runs in results.items():
                seconds, cpu, peak = (statistics.median(column) for column in zip(*runs, strict=True))
                floor = floor or [seconds, cpu]
                print(
                    f"  {who:<22} {seconds:6.1f} s {seconds / floor[0]:5.2f} x bare   CPU {cpu:6.2f} s "
                    f"{cpu / floor[1]:5.2f} x bare  {peak:7.0f} MiB anonymous"
                )


if __name__ == "__main__":
    main()
