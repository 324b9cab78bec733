"""Norms whose scale is held fixed, which makes a logit linear in the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm or LayerNorm of some family, by its class name."""
    return "norm" in type(module).__name__.lower()


def frozen_norm(norm: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Repeat what a norm did to x, as an affine function of x: its scale is a constant, no gradient.

    Families differ in whether the mean is taken away (LayerNorm) or not (RMSNorm), and in whether the
    gain is the weight, one plus the weight (Gemma, Nemotron) or one. Which of them holds is found by comparing with
    what the norm returned.

    Args:
        norm: the norm.
        x: [..., d] its input, through which gradients flow.
        output: [..., d] what it returned.

    Returns:
        [..., d] the output, and the norm's bias as a leaf that collects its own gradient, if it has one.

    Raises:
        ValueError: none of the known norms explains the output.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    stream, returned = x.to(exact), output.detach().to(exact)
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    shift = bias.detach().to(exact).requires_grad_() if isinstance(bias, Tensor) else None
    gains = [torch.ones((), dtype=exact, device=x.device)]
    if isinstance(weight, Tensor):
        gains = [weight.detach().to(exact), 1 + weight.detach().to(exact)]
    best, least = stream, float("inf")
    for gain in gains:
        for centred in (False, True):
            aligned = gain * (stream - stream.mean(-1, keepdim=True) if centred else stream)
            plain = returned if shift is None else returned - shift.detach()
            fixed = aligned.detach()
            # Least squares for the factor that the norm applied; exact if this is the right form.
            factor = (plain * fixed).sum(-1, keepdim=True) / fixed.square().sum(-1, keepdim=True).clamp(
                min=1e-30
            )
            error = float((fixed * factor - plain).abs().max() / plain.abs().max().clamp(min=1e-30))
            if error < least:
                best, least = aligned * factor, error
    if not least <= _TOLERANCE.get(output.dtype, 5e-2):
        raise ValueError(
            f"Expected {type(norm).__name__} to be an RMSNorm or a LayerNorm but neither explains its output "
            f"(relative error {least:.1e}): its contributions cannot be attributed. Pass `reset=None`."
        )
    return (best if shift is None else best + shift).to(output.dtype), shift
