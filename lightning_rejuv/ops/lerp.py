"""The lerp toward an anchor, in place, rounded stochastically and measured on the way: one read of both tensors (op E).

It is no op of ``torch.library``: weights are edited outside of compiled code. Where there is no kernel,
:mod:`lightning_rejuv.weights.edit` makes the same of PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rejuv.ops._library import has_kernel, triton_installed


def kernels_on(device: torch.device) -> bool:
    """Whether tensors on a device are lerped by a kernel, which makes its own random bits there."""
    return device.type == "cuda" and triton_installed()


def can_lerp(param: Tensor, base: Tensor) -> bool:
    """Whether there is a kernel for two tensors, and something for it to save.

    PyTorch's own lerp of two float32 tensors reads and writes as little.
    """
    wide = param.dtype == base.dtype == torch.float32
    return kernels_on(param.device) and param.numel() > 0 and has_kernel(param, base) and not wide


def lerp_(param: Tensor, base: Tensor, weight: float, generator: torch.Generator | None = None) -> Tensor:
    """Move ``param`` toward ``base`` in place, by a kernel: ``param + weight * (base - param)``.

    Computed in float32. The random bits of an element are a function of one draw from the generator and of the
    element's place, on every device.

    Args:
        param: float32, bfloat16 or float16, see :func:`can_lerp`; one that is not contiguous is copied meanwhile.
        base: of the same shape and of any of these dtypes; moved to the device of ``param`` as a whole.
        weight: the share of the base, 0 to 1.
        generator: with one, a half type is rounded stochastically; otherwise to nearest.

    Returns:
        What rounding did, ``[2, n]`` float32 on the device, partial sums that are to be added up in float64:
        ⟨base - param, exact - rounded⟩ and ‖base - param‖², with ``param`` as it was; zeros for float32.
    """
    from lightning_rejuv.ops import triton_lerp

    key = None
    if generator is not None and param.dtype != torch.float32:
        # A draw on the host: nothing waits for the device. Bit 62 makes every key an int64 of one kernel.
        draw = torch.randint(2**62, (), generator=generator, device=generator.device)
        key = int(draw) | 1 << 62
    fused = param.contiguous()
    sums = triton_lerp.lerp_(fused, base.to(param.device).contiguous(), weight, key)
    if fused is not param:
        param.copy_(fused)
    return sums
