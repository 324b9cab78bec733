"""Rise of the loss one ascent step away: the sharpness that SAM penalises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_rejuv.functional._checks import check_positive
from lightning_rejuv.functional.sharpness import _sharpness_check


def sam_gap(closure: Callable[[], Tensor], parameters: Sequence[Tensor], rho: float = 0.05) -> Tensor:
    r"""Loss at the worst nearby point minus the loss, ``L(θ + ρ g / ‖g‖) - L(θ)`` with ``g = ∇L(θ)``.

    Foret et al. 2021 (arXiv 2010.01412, equation 1, to first order). Parameters are moved in place and put
    back bit for bit, also where the closure raises.

    Args:
        closure: recomputes and returns the scalar loss, deterministically (eval mode).
        parameters: what to move; those that require no gradient are left out.
        rho: length of the step, over all parameters together.

    Returns:
        float64 scalar; 0 where the gradient is zero. ``.grad`` is not touched.

    Raises:
        ValueError: no parameter requires a gradient, or ρ is not positive.

    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> round(sam_gap(lambda: x.square().sum(), [x], rho=0.5).item(), 4)
    1.25
    """
    check_positive("rho", rho)
    kept = _sharpness_check(parameters)
    with torch.enable_grad():
        loss = closure()
        gradient = torch.autograd.grad(loss, kept, allow_unused=True)
    pairs = [(p, g) for p, g in zip(kept, gradient, strict=True) if g is not None]
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for _, g in pairs]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    if norm == 0:
        return torch.zeros((), dtype=torch.float64, device=kept[0].device)
    saved = [p.detach().clone() for p, _ in pairs]
    try:
        with torch.no_grad():
            for parameter, g in pairs:
                parameter.add_((g.double() * (rho / norm)).to(parameter.dtype))
            return closure().double() - loss.detach().double()
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(pairs, saved, strict=True):
                parameter.copy_(value)
