"""Compiles every Triton kernel for NVIDIA architectures with no GPU and reads what ptxas made of it.

``python -m tests.ops.compile_gate 80 90 100`` prints a table and exits 1 if a kernel spills registers, uses
local memory, or has fewer 16-byte loads in its longest loop than its data take. ``--sass`` adds the instructions
that this loop spends on an element: they bound the throughput. ``test_compile_gate.py`` runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lightning_rejuv.ops import triton_activation as activation
from lightning_rejuv.ops import triton_drift as drift
from lightning_rejuv.ops import triton_drift_sums as drift_sums
from lightning_rejuv.ops import triton_lerp as lerps
from lightning_rejuv.ops import triton_tokens as tokens

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDE_LOAD = re.compile(r"\bLDG(?:STS)?\.\S*\b128\b")
#: Of released models and of some with tokens added: rows that start on multiples of 128, 32, 16 and 2 bytes.
VOCABULARIES = (151936, 152064, 151672, 128256, 128264, 50257, 32001, 32008)


class Driver:
    """What Triton's compiler asks of a driver, answered without a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device: one "device" for each architecture.
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


class Case(NamedTuple):
    """A kernel with the arguments of a launch; ``wide`` loads of its longest loop must be of 16 bytes."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    elements: int
    wide: int


def cases() -> dict[str, Case]:
    """Every kernel in the variants that real models launch."""
    bf16, fp32 = torch.empty(64, 4096, dtype=torch.bfloat16), torch.empty(64, 4096)
    part, wide, mask = torch.empty(8), torch.empty(8, dtype=torch.float64), torch.empty(64, dtype=torch.bool)
    ids = torch.empty(8, dtype=torch.int64)
    size = (8192, 14336)

    def per_thread(tile: dict[str, int]) -> int:
        return tile["BT"] * tile["BN"] // (32 * tile["num_warps"])

    def act(h: torch.Tensor, masked: bool, stride: tuple[int, int] = (14336, 1)) -> Case:
        tile = activation.activation_tile(h)
        arguments = (h, mask if masked else h, part, *size, *stride, 0.01, 512)
        constants = {"HAS_MASK": masked, **tile}
        return Case(
            activation.activation_partials, arguments, constants, per_thread(tile), int(stride[1] == 1)
        )

    def grad(h: torch.Tensor, g: torch.Tensor) -> Case:
        tile = activation.activation_tile(h, g)
        arguments = (h, g, h, part, *size, 14336, 1, 14336, 1, 512)
        constants = {"HAS_MASK": False, **tile}
        return Case(activation.grad_activation_partials, arguments, constants, per_thread(tile), 2)

    def weights(w: torch.Tensor, b: torch.Tensor, strides: tuple[int, int] = (4096, 1)) -> Case:
        constants = drift.DRIFT_TILE
        count = constants["BR"] * constants["BC"] // (32 * constants["num_warps"])
        loads = count * (w.element_size() + b.element_size()) // 16 if strides[1] == 1 else 0
        arguments = (w, b, part, part, 14336, 4096, *strides, *strides, 32)
        return Case(drift.drift_partials, arguments, constants, count, loads)

    def logits(x: torch.Tensor, vocabulary: int, temperatures: bool = False, column_stride: int = 1) -> Case:
        constants = {"HAS_TARGET": True, "HAS_TAU": temperatures, **tokens.logits_tile(x)}
        strides = (vocabulary, 1) if column_stride == 1 else (1, column_stride)
        arguments = (x, ids, part, wide, ids, 8192, vocabulary, *strides, 0, 16384, 1.0, 0)
        elements = constants["L"] * constants["K"] // (32 * constants["num_warps"])
        loads = elements * x.element_size() // 16 if constants["CONTIGUOUS"] else 0
        return Case(tokens.token_partials_kernel, arguments, constants, elements, loads)

    def merge(final: bool) -> Case:
        arguments = (wide, ids, wide, ids, 9, 64)
        return Case(tokens.merge_kernel, arguments, {"FINAL": final, **tokens.MERGE_TILE}, 1, 0)

    def lerp(w: torch.Tensor, b: torch.Tensor, stochastic: bool) -> Case:
        half = w.element_size() == 2
        constants = {
            "NEAR_BASE": False,
            "STOCHASTIC": stochastic,
            "DROPPED": lerps.dropped_bits(w.dtype),
            "LARGEST": torch.finfo(w.dtype).max,
            "MEASURE": half,
            **lerps.LERP_TILE,
        }
        count = constants["L"] * lerps.NEIGHBOURS // (32 * constants["num_warps"])
        loads = count * (w.element_size() + b.element_size()) // 16
        return Case(lerps.lerp_kernel, (w, b, part, 14336 * 4096, 0.4, 1 << 62, 16), constants, count, loads)

    def sums(w: torch.Tensor, b: torch.Tensor) -> Case:
        count = drift_sums.TILE["L"] * drift_sums.TILE["K"] // (32 * drift_sums.TILE["num_warps"])
        loads = count * (w.element_size() + b.element_size()) // 16
        arguments = (w, b, part, 14336 * 4096, 16, 0.0)
        return Case(drift_sums.drift_sums_kernel, arguments, dict(drift_sums.TILE), count, loads)

    combine = {"Q": 7, "MAXIMUM": 3, **activation.COMBINE_TILE}
    return {
        "A bf16": act(bf16, masked=False),
        "A bf16 mask": act(bf16, masked=True),
        "A fp32": act(fp32, masked=False),
        "A bf16 transposed": act(bf16, masked=False, stride=(1, 8192)),
        "B bf16": grad(bf16, bf16),
        "B bf16 fp32 grad": grad(bf16, fp32),
        "C bf16": weights(bf16, bf16),
        "C fp32 bf16 base": weights(fp32, bf16),
        "C bf16 transposed": weights(bf16, bf16, strides=(1, 14336)),
        "C combine": Case(
            drift.combine_drift,
            (part, part, wide, wide, 16, 66, 14336, 4096),
            dict(activation.COMBINE_TILE),
            1,
            0,
        ),
        "A, B combine": Case(activation.combine_partials, (part, wide, 16, 14336), combine, 1, 0),
        **{f"D bf16 {vocabulary}": logits(bf16, vocabulary) for vocabulary in VOCABULARIES},
        "D bf16 temperatures": logits(bf16, 151936, temperatures=True),
        "D bf16 from column 1": logits(bf16[:, 1:], 50257),
        "D bf16 transposed": logits(bf16.t(), 151936, column_stride=8192),
        "D fp32 151936": logits(fp32, 151936),
        "D fp32 50257": logits(fp32, 50257),
        "E bf16": lerp(bf16, bf16, stochastic=True),
        "E bf16 to nearest": lerp(bf16, bf16, stochastic=False),
        "E bf16 fp32 base": lerp(bf16, fp32, stochastic=True),
        "E fp16": lerp(bf16.half(), bf16.half(), stochastic=True),
        "E fp32 bf16 base": lerp(fp32, bf16, stochastic=False),
        "drift sums bf16": sums(bf16, bf16),
        "drift sums fp32 bf16 base": sums(fp32, bf16),
        "D merge partials": merge(final=False),
        "D merge statistics": merge(final=True),
    }


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """Return what a tool of the CUDA toolkit, as Triton ships it, prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def longest_loop(cubin: bytes) -> list[str]:
    """Return the SASS instructions of the longest loop body: the span of a backward branch."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    longest: list[str] = []
    for line in run_tool("nvdisasm", cubin, "-c").splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*`\((\.L_\S+)\)", instruction[1])
            if branch and branch[1] in labels:
                longest = max(longest, instructions[labels[branch[1]] :], key=len)
    return longest


def check(name: str, case: Case, sass: bool) -> bool:
    """Compile one case, print its row, and return whether it passes."""
    compiled = case.kernel.warmup(*case.arguments, grid=(1,), **case.constants)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    cubin = compiled.asm["cubin"]
    used = {
        key: int(value)
        for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", run_tool("cuobjdump", cubin, "-res-usage"))
    }
    loop = longest_loop(cubin)
    wide = sum(bool(WIDE_LOAD.search(instruction)) for instruction in loop)
    reasons = []
    if used["STACK"] or used["LOCAL"]:
        reasons.append(f"spills or local memory: stack {used['STACK']} B, local {used['LOCAL']} B")
    if wide < case.wide:
        reasons.append(f"expected at least {case.wide} 16-byte loads in the loop")
    spent = f"{len(loop) / case.elements:6.1f} instructions/element" if sass else ""
    print(
        f"{name:22s} {used['REG']:3d} registers {compiled.metadata.shared:6d} B shared "
        f"{wide:2d} 16-byte loads{spent}  {'; '.join(reasons) or 'ok'}",
        flush=True,
    )
    return not reasons


def main(arguments: list[str]) -> int:
    """Check every case for each ``sm_<capability>``; return the number of failures."""
    sass = "--sass" in arguments
    failures = 0
    for capability in (int(argument) for argument in arguments if argument != "--sass"):
        driver.set_active(Driver(capability))
        print(f"sm_{capability}, triton {triton.__version__}", flush=True)
        failures += sum(not check(name, case, sass) for name, case in cases().items())
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
