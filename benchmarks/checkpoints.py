"""Fusion of two checkpoints on disk: lightning-rejuv beside a bare streaming lerp and mergekit.

Each contender runs in processes of its own on the same two checkpoints, in turn; the wall time counts from
the start of the process until the result is synced to the disk, the peak is of its anonymous memory. mergekit
pins its own versions of other packages, so that it is called by the path of its script:

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    python -m benchmarks.checkpoints --mergekit mergekit/bin/mergekit-yaml
"""

from __future__ import annotations

import argparse
import json
import os
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

# About 0.5 and 1.8 GB in bfloat16: hidden size, layers, intermediate size, vocabulary.
_SIZES = {"0.5 GB": (1024, 14, 2816, 32000), "1.8 GB": (2048, 16, 5632, 32000)}
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


def bare(base: Path, sft: Path, out: Path) -> None:
    """What nothing can do without: read both, lerp, write, sync."""
    out.mkdir()
    with safe_open(base / "model.safetensors", "pt") as b, safe_open(sft / "model.safetensors", "pt") as s:
        fused = {name: torch.lerp(s.get_tensor(name), b.get_tensor(name), 0.5) for name in s.keys()}  # noqa: SIM118
        save_file(fused, out / "model.safetensors", {"format": "pt"})
    os.sync()


def commands(base: Path, sft: Path, out: Path, mergekit: str | None) -> dict[str, list[str]]:
    """Return each contender's command line."""
    rejuv = [
        sys.executable,
        "-m",
        "lightning_rejuv.cli.main",
        "rejuvenate",
        "--base",
        str(base),
        "--sft",
        str(sft),
    ]
    # The others round to nearest.
    fusion = ["--alpha", "0.5", "--rounding", "nearest"]
    found = {
        "bare lerp": [
            sys.executable,
            "-m",
            "benchmarks.checkpoints",
            "--bare",
            str(base),
            str(sft),
            str(out),
        ],
        "lightning-rejuv": [*rejuv, "--out", str(out), *fusion, "--quiet"],
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


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return seconds and the peak of its anonymous memory in MiB."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line))
        except (OSError, TypeError):
            pass
        time.sleep(0.005)
    os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        assert process.stderr is not None
        raise RuntimeError(f"{command[0]} failed: {process.stderr.read().decode()[-2000:]}")
    return seconds, peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="path of the mergekit-yaml script; left out without it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=_SIZES, default=list(_SIZES))
    parser.add_argument(
        "--bare", nargs=3, type=Path, metavar=("BASE", "SFT", "OUT"), help="one bare lerp, and exit"
    )
    arguments = parser.parse_args()
    if arguments.bare:
        bare(*arguments.bare)
        return
    for label, size in ((label, _SIZES[label]) for label in arguments.sizes):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            base, sft, out = root / "base", root / "sft", root / "out"
            nbytes = write_checkpoint(base, size, 0)
            write_checkpoint(sft, size, 0, noise=0.1)
            os.sync()
            results: dict[str, list[tuple[float, float]]] = {}
            for run in range(arguments.runs + 1):
                for who, command in commands(base, sft, out, arguments.mergekit).items():
                    result = measure(command)
                    if run:  # the first round fills the page cache
                        results.setdefault(who, []).append(result)
                    shutil.rmtree(out)
            print(f"{label} ({nbytes / 1e9:.2f} GB), median of {arguments.runs}")
            floor = statistics.median(seconds for seconds, _ in results["bare lerp"])
            for who, runs in results.items():
                seconds = statistics.median(s for s, _ in runs)
                peak = statistics.median(p for _, p in runs)
                print(
                    f"  {who:<16} {seconds:6.1f} s  {seconds / floor:5.2f} x bare  {peak:7.0f} MiB anonymous"
                )


if __name__ == "__main__":
    main()
