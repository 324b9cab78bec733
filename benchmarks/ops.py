"""Times the fused statistics against eager, careful eager, torch.compile and Liger, as % of the roofline.

``python benchmarks/ops.py --out DIR`` takes under 8 minutes on a GPU and checks every op against its float64
reference before timing it; without a GPU it measures the CPU back end on one thread. ``--tiny`` only shows
that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ops_baselines as baselines
import torch
from ops_measure import Bench, installed
from torch import Tensor, nn

from lightning_rejuv import edit, ops
from lightning_rejuv.ops import reference

BF16 = torch.bfloat16
Run = Callable[[], object]


def normal(bench: Bench, rows: int, columns: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    """Random numbers, filled in pieces so that no float32 copy of the whole is ever held."""
    x = torch.empty(rows, columns, device=bench.device, dtype=dtype)
    for piece in x.split(1024):
        piece.copy_(scale * torch.randn(piece.shape, device=bench.device))
    return x


def compiled(function: Callable[..., object], *arguments: Tensor) -> Run:
    """Compile for fixed shapes; the first call pays for it."""
    run = torch.compile(function, dynamic=False)
    return lambda: run(*arguments)


def check(name: str, found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Refuse to time an op that is wrong."""
    error = ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if not error < tolerance:
        raise AssertionError(f"{name}: relative error {error:.1e} against the float64 reference.")


@contextmanager
def tile(table: dict[str, int], **changes: int) -> Iterator[None]:
    """Launch with another tile for a while."""
    before = dict(table)
    table.update(changes)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def tiled(table: dict[str, int], run: Run, **changes: int) -> Run:
    """Return ``run`` under another tile."""

    def launch() -> None:
        with tile(table, **changes):
            run()

    return launch


def activation(bench: Bench, tokens: int, neurons: int, dtype: torch.dtype, sweep: bool) -> None:
    h = normal(bench, tokens, neurons, dtype)
    part = h[: min(tokens, 8192)]
    expected = reference.activation_stats(part, eps=baselines.EPS)
    for row, want in zip(ops.activation_stats(part, eps=baselines.EPS), expected, strict=True):
        check("activation_stats", row, want, tolerance=1e-3 if want is expected[1] else 2e-5)
    table = torch.zeros(7, neurons, dtype=torch.float64, device=bench.device)

    def run() -> object:
        return ops.activation_stats(h, eps=baselines.EPS, out=table)

    variants: dict[str, Run] = {"ours": run}
    if sweep and bench.cuda:
        from lightning_rejuv.ops import triton_activation

        shapes = [(128, 1, 4), (128, 2, 4), (128, 4, 4), (256, 3, 8), (64, 3, 4), (64, 4, 2)]
        for columns, stages, warps in shapes:
            change = {"BN": columns, "NS": stages, "num_warps": warps}
            variants[f"ours BN{columns} NS{stages} w{warps}"] = tiled(
                triton_activation.ACTIVATION_TILE, run, **change
            )
    variants["careless eager"] = lambda: baselines.activation_careless(h)
    variants["careful eager"] = lambda: baselines.activation_careful(h)
    variants["torch.compile"] = compiled(baselines.activation_careless, h)
    bench.case("A act", f"{tokens}x{neurons} {str(dtype)[6:]}", h.nbytes, variants)


def grad_activation(bench: Bench, tokens: int, neurons: int, dtype: torch.dtype) -> None:
    h, g = normal(bench, tokens, neurons, dtype), normal(bench, tokens, neurons, dtype)
    check(
        "grad_activation_stats", ops.grad_activation_stats(h, g)[0], reference.grad_activation_stats(h, g)[0]
    )
    table = torch.zeros(4, neurons, dtype=torch.float64, device=bench.device)
    variants: dict[str, Run] = {
        "ours": lambda: ops.grad_activation_stats(h, g, out=table),
        "careless eager": lambda: baselines.grad_activation_careless(h, g),
        "torch.compile": compiled(baselines.grad_activation_careless, h, g),
    }
    bench.case("B grad act", f"{tokens}x{neurons} {str(dtype)[6:]}", 2 * h.nbytes, variants)


def drift(bench: Bench, rows: int, columns: int, dtype: torch.dtype) -> None:
    base = normal(bench, rows, columns, dtype)
    weight = base + normal(bench, rows, columns, dtype, scale=1e-2)
    piece = slice(0, 4096)
    found, expected = (
        ops.weight_drift(weight[piece], base[piece]),
        reference.weight_drift(weight[piece], base[piece]),
    )
    check("weight_drift rows", torch.stack(found.rows), expected[0])
    check("weight_drift columns", torch.stack(found.columns), expected[1])

    def run() -> object:
        return ops.weight_drift(weight, base)

    variants: dict[str, Run] = {"ours": run}
    if bench.cuda:
        from lightning_rejuv.ops.triton_drift import DRIFT_TILE

        for r, c, stages in ((8, 256, 2), (16, 128, 1), (8, 128, 1), (4, 256, 3)):
            variants[f"ours BR{r} BC{c} NS{stages}"] = tiled(DRIFT_TILE, run, BR=r, BC=c, NS=stages)
    variants["careless eager"] = lambda: baselines.drift_careless(weight, base)
    variants["careful eager"] = lambda: baselines.drift_careful(weight, base)
    variants["torch.compile"] = compiled(baselines.drift_careless, weight, base)
    bench.case("C drift", f"{rows}x{columns} {str(dtype)[6:]}", 2 * weight.nbytes, variants)


def liger_loss(x: Tensor, y: Tensor) -> Run:
    """Liger's cross entropy, forward, loss only."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda: loss(x, y)


def tokens(bench: Bench, rows: int, vocabulary: int, dtype: torch.dtype, thorough: bool) -> None:
    x = normal(bench, rows, vocabulary, dtype, scale=3.0)
    y = torch.randint(0, vocabulary, (rows,), device=bench.device)
    expected, ids = reference.token_stats(x[:64], y[:64])
    found = ops.token_stats(x[:64], y[:64])
    for statistic, want in zip(found[:4], expected, strict=True):
        check("token_stats", statistic, want)
    assert torch.equal(found.top1_id, ids)
    variants: dict[str, Run] = {"ours": lambda: ops.token_stats(x, y)}
    if bench.cuda and thorough:
        from lightning_rejuv.ops import triton_tokens

        for lanes, warps in ((128, 4), (512, 4), (512, 8)):

            def launch(lanes: int = lanes, warps: int = warps) -> None:
                before = triton_tokens.ALIGNED_LANES
                triton_tokens.ALIGNED_LANES = lanes
                try:
                    with tile(triton_tokens.OPTIONS, num_warps=warps):
                        ops.token_stats(x, y)
                finally:
                    triton_tokens.ALIGNED_LANES = before

            if vocabulary * x.element_size() % 16 == 0:
                variants[f"ours L{lanes} w{warps}"] = launch
    variants["careless eager"] = lambda: baselines.tokens_careless(x, y)
    variants["careful eager"] = lambda: baselines.tokens_careful(x, y)
    if thorough:
        variants["torch.compile careless"] = compiled(baselines.tokens_careless, x, y)
    variants["torch.compile careful"] = compiled(baselines.tokens_careful, x, y)
    variants["trainers' chunks (2 of 5)"] = lambda: baselines.tokens_in_trainers(x, y)
    if bench.cuda and installed("liger-kernel") != "none":
        variants["Liger cross entropy (loss only)"] = liger_loss(x, y)
    bench.case("D tokens", f"{rows}x{vocabulary} {str(dtype)[6:]}", x.nbytes, variants)


def tokens_from_hidden(bench: Bench, rows: int, hidden: int, vocabulary: int) -> None:
    h, w = normal(bench, rows, hidden), normal(bench, vocabulary, hidden, scale=0.02)
    y = torch.randint(0, vocabulary, (rows,), device=bench.device)
    few = slice(0, 32)
    expected, _ = reference.token_stats(h[few].double() @ w.double().t(), y[few])
    check("token_stats_from_hidden", ops.token_stats_from_hidden(h[few], w, y[few]).entropy, expected[0])

    pieces = [slice(i, i + 1024) for i in range(0, rows, 1024)]
    variants: dict[str, Run] = {
        "ours, float32 logits, 1024": lambda: ops.token_stats_from_hidden(h, w, y),
        "ours, float32 logits, 256": lambda: ops.token_stats_from_hidden(h, w, y, chunk_size=256),
        "bf16 logits + ours, 1024": lambda: [ops.token_stats(h[at] @ w.t(), y[at]) for at in pieces],
        "matmul alone, 1024": lambda: [h[at] @ w.t() for at in pieces],
    }
    shape = f"{rows}x{hidden}->{vocabulary}"
    bench.case("D hidden", shape, h.nbytes + w.nbytes, variants, flops=2.0 * rows * hidden * vocabulary)


def fusion(bench: Bench, matrices: int, size: int, vectors: int) -> None:
    shapes = [(size, size)] * matrices + [(size,)] * vectors
    weights = [torch.randn(shape, device=bench.device).to(BF16) for shape in shapes]
    anchors = [weight.clone() for weight in weights]
    pairs = list(zip(weights, anchors, strict=True))
    variants: dict[str, Run] = {
        "edit.lerp_": lambda: [edit.lerp_(w, b, 0.5) for w, b in pairs],
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(weights, anchors, 0.5),
        "out of place": lambda: [0.5 * w + 0.5 * b for w, b in pairs],
    }
    read = 3 * sum(weight.nbytes for weight in weights)
    bench.case("E fuse", f"{matrices}x{size}^2+{vectors}x{size}", read, variants)


def training_step(bench: Bench, layers: int, width: int, rows: int) -> None:
    """What a hook on every layer costs a training step, sampled every N steps."""

    def block() -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    blocks = [block() for _ in range(layers)]
    net = nn.Sequential(*blocks).to(bench.device, BF16)
    tables = [torch.zeros(7, 4 * width, dtype=torch.float64, device=bench.device) for _ in blocks]
    x = normal(bench, rows, width)
    state = {"step": 0, "every": 0}

    def hook(table: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if state["every"] and state["step"] % state["every"] == 0:
                ops.activation_stats(inputs[0], out=table)

        return record

    for layer, table in zip(blocks, tables, strict=True):
        layer[2].register_forward_pre_hook(hook(table))

    def steps(every: int, count: int = 50) -> Run:
        def run() -> None:
            state["every"] = every
            for state["step"] in range(1 if bench.tiny else count):
                net(x).sum().backward()

        return run

    variants = {f"50 steps, every {n}" if n else "50 steps, off": steps(n) for n in (0, 1, 10, 50)}
    flops = (1 if bench.tiny else 50) * layers * 6.0 * rows * 8 * width**2
    bench.case("A step", f"{layers} layers, {rows}x{width}", 0.0, variants, flops=flops)


def run_cuda(bench: Bench) -> None:
    """The sizes of an 8B model with 8192 tokens a device."""
    for size in ((8192, 14336), (8192, 4096), (32768, 14336)):
        activation(bench, *size, BF16, sweep=size == (8192, 14336))
    grad_activation(bench, 8192, 14336, BF16)
    for size in ((14336, 4096), (4096, 14336), (151936, 4096)):
        drift(bench, *size, BF16)
    for size in ((8192, 151936), (8192, 128256), (8192, 50257), (64, 151936)):
        tokens(bench, *size, BF16, thorough=size == (8192, 151936))
    tokens(bench, 2048, 151936, torch.float32, thorough=False)
    tokens_from_hidden(bench, 8192, 4096, 151936)
    fusion(bench, 24, 4096, 300)
    training_step(bench, 24, 1024, 8192)


def run_cpu(bench: Bench, shrink: int) -> None:
    """The sizes of the CPU targets; ``shrink`` divides them."""
    torch.set_num_threads(1)
    side = 4096 // shrink
    for dtype in (torch.float32, BF16):
        activation(bench, side, side, dtype, sweep=False)
        grad_activation(bench, side, side, dtype)
        drift(bench, side, side, dtype)
        tokens(bench, 256 // shrink, 50257 // shrink, dtype, thorough=True)
    tokens_from_hidden(bench, 256 // shrink, 512 // shrink, 50257 // shrink)
    fusion(bench, 4, 2048 // shrink, 16)
    if shrink > 1:
        training_step(bench, 2, 64, 64)


def main() -> None:
    """Measure what this machine has and write the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSV")
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds after which nothing new is started"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU: does the script run?")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(device, options.budget, options.tiny)
    try:
        run_cuda(bench) if bench.cuda else run_cpu(bench, shrink=64 if options.tiny else 1)
    finally:
        print(f"{len(bench.rows)} rows in {bench.write(options.out)}, {bench.budget - bench.left():.0f} s")


if __name__ == "__main__":
    main()
