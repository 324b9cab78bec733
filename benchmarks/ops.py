"""Times the fused statistics against eager, torch.compile and other people's kernels, in % of the roofline.

``python benchmarks/ops.py --out DIR`` checks every op against float64 before it is timed;
without a GPU it measures the CPU back end on one thread. Nothing new is started once ``--budget`` seconds are over
(420 by default): what matters most comes first. ``--tiny`` only shows that it runs. ``ops_kernels.py`` says how
kernels of TRL, verl and Liger get into the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ops_baselines as baselines
import ops_kernels as kernels
import torch
from ops_measure import Bench
from torch import Tensor, nn

from lightning_rejuv import ops
from lightning_rejuv.ops import reference
from lightning_rejuv.ops.drift_sums import drift_sums
from lightning_rejuv.weights import edit

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


def activation(bench: Bench, tokens: int, neurons: int, dtype: torch.dtype, sweep: bool = False) -> None:
    """A at one size: ours beside what people write, or with ``sweep`` ours with other tiles."""
    h = normal(bench, tokens, neurons, dtype)
    part = h[: min(tokens, 8192)]
    expected = reference.activation_stats(part, eps=baselines.EPS)
    for row, want in zip(ops.activation_stats(part, eps=baselines.EPS), expected, strict=True):
        check("activation_stats", row, want, tolerance=1e-3 if want is expected[1] else 2e-5)
    table = torch.zeros(7, neurons, dtype=torch.float64, device=bench.device)

    def run() -> object:
        return ops.activation_stats(h, eps=baselines.EPS, out=table)

    variants: dict[str, Run] = {"ours": run}
    if sweep:
        from lightning_rejuv.ops import triton_activation

        shapes = [(128, 3, 4), (128, 4, 4), (256, 3, 8), (64, 3, 4), (64, 3, 2), (64, 6, 2)]
        for columns, stages, warps in shapes:
            change = {"BN": columns, "NS": stages, "num_warps": warps}
            variants[f"ours BN{columns} NS{stages} w{warps}"] = tiled(
                triton_activation.ACTIVATION_TILE, run, **change
            )
    else:
        variants["torch.compile"] = compiled(baselines.activation_careless, h)
        variants["careless eager"] = lambda: baselines.activation_careless(h)
        variants["careful eager"] = lambda: baselines.activation_careful(h)
    bench.case("A act", f"{tokens}x{neurons} {str(dtype)[6:]}", h.nbytes, variants)


def grad_activation(bench: Bench, tokens: int, neurons: int, dtype: torch.dtype) -> None:
    """B at one size."""
    h, g = normal(bench, tokens, neurons, dtype), normal(bench, tokens, neurons, dtype)
    check(
        "grad_activation_stats", ops.grad_activation_stats(h, g)[0], reference.grad_activation_stats(h, g)[0]
    )
    table = torch.zeros(4, neurons, dtype=torch.float64, device=bench.device)
    variants: dict[str, Run] = {
        "ours": lambda: ops.grad_activation_stats(h, g, out=table),
        "torch.compile": compiled(baselines.grad_activation_careless, h, g),
        "careless eager": lambda: baselines.grad_activation_careless(h, g),
    }
    bench.case("B grad act", f"{tokens}x{neurons} {str(dtype)[6:]}", 2 * h.nbytes, variants)


def drift(bench: Bench, rows: int, columns: int, dtype: torch.dtype, sweep: bool = False) -> None:
    """C at one size: ours beside what people write, or with ``sweep`` ours with other tiles."""
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
    if sweep:
        from lightning_rejuv.ops.triton_drift import DRIFT_TILE

        for r, c, stages in ((8, 256, 2), (16, 128, 1), (8, 128, 1), (4, 256, 3)):
            variants[f"ours BR{r} BC{c} NS{stages}"] = tiled(DRIFT_TILE, run, BR=r, BC=c, NS=stages)
    else:
        variants["torch.compile"] = compiled(baselines.drift_careless, weight, base)
        variants["careless eager"] = lambda: baselines.drift_careless(weight, base)
        variants["careful eager"] = lambda: baselines.drift_careful(weight, base)
    bench.case("C drift", f"{rows}x{columns} {str(dtype)[6:]}", 2 * weight.nbytes, variants)


def tokens(bench: Bench, rows: int, vocabulary: int, dtype: torch.dtype, thorough: bool = False) -> None:
    """D at one size; ``thorough`` adds what is slow to run or to compile, and other people's kernels."""
    x = normal(bench, rows, vocabulary, dtype, scale=3.0)
    y = torch.randint(0, vocabulary, (rows,), device=bench.device)
    found = ops.token_stats(x, y)
    for part in (slice(0, 32), slice(-32, None)):  # rows of the very launch that is timed
        expected, ids = reference.token_stats(x[part], y[part])
        for statistic, want in zip(found[:4], expected, strict=True):
            check("token_stats", statistic[part], want)
        if not torch.equal(found.top1_id[part], ids):
            raise AssertionError("token_stats: another top-1 than the float64 reference.")
    variants: dict[str, Run] = {"ours": lambda: ops.token_stats(x, y)}
    variants["torch.compile careful"] = compiled(baselines.tokens_careful, x, y)
    variants["careful eager"] = lambda: baselines.tokens_careful(x, y)
    if thorough:
        variants["careless eager"] = lambda: baselines.tokens_careless(x, y)
        variants["trainers' chunks (2 of 5)"] = lambda: baselines.tokens_in_trainers(x, y)
        variants |= kernels.tokens(x, y, bench.kernels)
        variants["torch.compile careless"] = compiled(baselines.tokens_careless, x, y)
    bench.case("D tokens", f"{rows}x{vocabulary} {str(dtype)[6:]}", x.nbytes, variants)


def tokens_sweep(bench: Bench, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """D at one size with other tiles; the rows start on 16 bytes."""
    from lightning_rejuv.ops import triton_tokens

    x = normal(bench, rows, vocabulary, dtype, scale=3.0)
    y = torch.randint(0, vocabulary, (rows,), device=bench.device)

    def launch(lanes: int, warps: int) -> Run:
        def run() -> None:
            before = triton_tokens.ALIGNED_LANES
            triton_tokens.ALIGNED_LANES = lanes
            try:
                with tile(triton_tokens.OPTIONS, num_warps=warps):
                    ops.token_stats(x, y)
            finally:
                triton_tokens.ALIGNED_LANES = before

        return run

    variants: dict[str, Run] = {"ours": lambda: ops.token_stats(x, y)}
    for lanes, warps in ((128, 4), (512, 4), (512, 8)):
        variants[f"ours L{lanes} w{warps}"] = launch(lanes, warps)
    bench.case("D tokens", f"{rows}x{vocabulary} {str(dtype)[6:]}", x.nbytes, variants)


def tokens_from_hidden(bench: Bench, rows: int, hidden: int, vocabulary: int) -> None:
    """D with the output projection."""
    h, w = normal(bench, rows, hidden), normal(bench, vocabulary, hidden, scale=0.02)
    y = torch.randint(0, vocabulary, (rows,), device=bench.device)
    few = slice(0, 32)
    expected, _ = reference.token_stats(h[few].double() @ w.double().t(), y[few])
    check("token_stats_from_hidden", ops.token_stats_from_hidden(h[few], w, y[few]).entropy, expected[0])

    pieces = [slice(i, i + 1024) for i in range(0, rows, 1024)]
    variants: dict[str, Run] = {
        "ours, float32 logits, 1024": lambda: ops.token_stats_from_hidden(h, w, y),
        "bf16 logits + ours, 1024": lambda: [ops.token_stats(h[at] @ w.t(), y[at]) for at in pieces],
        "matmul alone, 1024": lambda: [h[at] @ w.t() for at in pieces],
        "ours, float32 logits, 256": lambda: ops.token_stats_from_hidden(h, w, y, chunk_size=256),
        **kernels.tokens_from_hidden(h, w, y, bench.kernels),
    }
    shape = f"{rows}x{hidden}->{vocabulary}"
    bench.case("D hidden", shape, h.nbytes + w.nbytes, variants, flops=2.0 * rows * hidden * vocabulary)


def fusion(bench: Bench, matrices: int, size: int, vectors: int, dtype: torch.dtype = BF16) -> None:
    """E: the lerp of square matrices and vectors toward bfloat16 anchors."""
    shapes = [(size, size)] * matrices + [(size,)] * vectors
    weights = [torch.randn(shape, device=bench.device).to(dtype) for shape in shapes]
    anchors = [(1.01 * weight).to(BF16) for weight in weights]
    pairs = list(zip(weights, anchors, strict=True))
    exact, fused = torch.lerp(weights[0].double(), anchors[0].double(), 0.3), weights[0].clone()
    edit.lerp_(fused, anchors[0], 0.3)
    check("lerp_", fused, exact, tolerance=torch.finfo(dtype).eps)
    generator = torch.Generator().manual_seed(0)
    variants: dict[str, Run] = {"ours, nearest": lambda: [edit.lerp_(w, b, 1e-3) for w, b in pairs]}
    if dtype == BF16:
        edit.lerp_(fused.copy_(weights[0]), anchors[0], 0.3, generator=generator)
        check("lerp_, stochastic, on average", fused.double().mean(0), exact.mean(0), tolerance=1e-2)
        variants |= {
            "ours, stochastic": lambda: [edit.lerp_(w, b, 1e-3, generator=generator) for w, b in pairs],
            "ours, stochastic and measured": lambda: [
                edit.lerp_measuring_(w, b, 1e-3, generator) for w, b in pairs
            ],
            "torch._foreach_lerp_": lambda: torch._foreach_lerp_(weights, anchors, 1e-3),
        }
    variants["out of place"] = lambda: [0.999 * w + 0.001 * b for w, b in pairs]
    moved = sum(2 * weight.nbytes + anchor.nbytes for weight, anchor in pairs)
    bench.case("E fuse", f"{matrices}x{size}^2+{vectors}x{size} {str(dtype)[6:]}", moved, variants)


def sums(bench: Bench, matrices: int, size: int) -> None:
    """The two sums of a drift, of matrices."""
    weights = [normal(bench, size, size) for _ in range(matrices)]
    pairs = [(weight, (1.01 * weight).to(BF16)) for weight in weights]
    weight, base = (tensor.double() for tensor in pairs[0])
    for found, want in zip(
        drift_sums(*pairs[0]), ((weight - base).square().sum(), base.square().sum()), strict=False
    ):
        check("drift_sums", found[None], want[None])
    variants: dict[str, Run] = {
        "ours": lambda: [drift_sums(w, b) for w, b in pairs],
        "rows and columns (op C)": lambda: [ops.weight_drift(w, b) for w, b in pairs],
        "careless eager": lambda: [
            ((w.float() - b.float()).square().sum(), b.float().square().sum()) for w, b in pairs
        ],
    }
    bench.case("drift sums", f"{matrices}x{size}^2 bfloat16", 2 * sum(w.nbytes for w in weights), variants)


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

    count = 1 if bench.tiny else 10

    def steps(every: int) -> Run:
        def run() -> None:
            state["every"] = every
            for state["step"] in range(count):
                net(x).sum().backward()

        return run

    variants = {f"10 steps, every {n}" if n else "10 steps, off": steps(n) for n in (0, 1, 10)}
    flops = count * layers * 6.0 * rows * 8 * width**2
    bench.case("A step", f"{layers} layers, {rows}x{width}", 0.0, variants, flops=flops)


def cases_cuda(bench: Bench) -> list[Run]:
    """The sizes of an 8B model with 8192 tokens a device, what matters most first: the budget cuts the end."""
    return [
        lambda: tokens(bench, 8192, 151936, BF16, thorough=True),
        lambda: activation(bench, 8192, 14336, BF16),
        lambda: drift(bench, 14336, 4096, BF16),
        # Rows of 8 modulo 16 elements, as padding to a multiple of 8 makes them; then rows of odd length.
        lambda: tokens(bench, 8192, 128264, BF16),
        lambda: tokens(bench, 8192, 50257, BF16),
        lambda: tokens_from_hidden(bench, 8192, 4096, 151936),
        lambda: grad_activation(bench, 8192, 14336, BF16),
        lambda: fusion(bench, 24, 4096, 300),
        lambda: fusion(bench, 24, 4096, 300, torch.float32),
        lambda: sums(bench, 24, 4096),
        lambda: training_step(bench, 24, 1024, 8192),
        lambda: tokens(bench, 64, 151936, BF16),
        lambda: tokens(bench, 512, 151936, BF16),
        lambda: activation(bench, 8192, 14336, BF16, sweep=True),
        lambda: drift(bench, 14336, 4096, BF16, sweep=True),
        lambda: tokens_sweep(bench, 8192, 151936, BF16),
        lambda: tokens(bench, 2048, 151936, torch.float32),
        lambda: activation(bench, 32768, 14336, BF16),
        lambda: drift(bench, 151936, 4096, BF16),
        lambda: activation(bench, 8192, 4096, BF16),
        lambda: drift(bench, 4096, 14336, BF16),
    ]


def cases_cpu(bench: Bench, shrink: int) -> list[Run]:
    """The sizes of the CPU targets; ``shrink`` divides them."""
    side, rows, vocabulary = 4096 // shrink, 256 // shrink, 50257 // shrink
    cases: list[Run] = []
    for dtype in (torch.float32, BF16):
        cases += [
            partial(activation, bench, side, side, dtype),
            partial(grad_activation, bench, side, side, dtype),
            partial(drift, bench, side, side, dtype),
            partial(tokens, bench, rows, vocabulary, dtype, thorough=True),
        ]
    cases += [
        lambda: tokens_from_hidden(bench, rows, 512 // shrink, vocabulary),
        lambda: fusion(bench, 4, 2048 // shrink, 16),
        lambda: fusion(bench, 4, 2048 // shrink, 16, torch.float32),
        lambda: sums(bench, 4, 2048 // shrink),
    ]
    return [*cases, lambda: training_step(bench, 2, 64, 64)] if shrink > 1 else cases


def main() -> None:
    """Measure what this machine has and write the table as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSV")
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds after which nothing new is started"
    )
    parser.add_argument("--kernels", type=Path, help="folder with other people's kernels, see ops_kernels.py")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU: does the script run?")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(device, options.budget, options.tiny, options.out, options.kernels)
    for case in cases_cuda(bench) if bench.cuda else cases_cpu(bench, shrink=64 if options.tiny else 1):
        bench.attempt(case)
    print(f"{len(bench.rows)} rows in {bench.path}, {options.budget - bench.left():.0f} s")
    if bench.failures:
        sys.exit(f"{bench.failures} cases or variants failed, see above.")


if __name__ == "__main__":
    main()
