"""Curvature of the loss: the largest eigenvalue of its Hessian, and its rise one ascent step away."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_rejuv.functional._checks import check_count, check_positive


def _trainable(parameters: Sequence[Tensor]) -> list[Tensor]:
    kept = [parameter for parameter in parameters if parameter.requires_grad]
    if not kept:
        raise ValueError(
            f"Expected argument `parameters` to hold parameters that require a gradient but got "
            f"{len(parameters)} that do not."
        )
    return kept


def sharpness(
    closure: Callable[[], Tensor], parameters: Sequence[Tensor], iterations: int = 20, seed: int = 0
) -> Tensor:
    r"""Largest eigenvalue ``λ_max(∇²L)`` of the loss's Hessian, by Lanczos with full reorthogonalisation.

    It is what "sharp, rigid landscape" would mean in arXiv 2606.09932, which claims and never measures it. Lanczos
    is done as in Ghorbani et al. 2019 (arXiv 1901.10159). The figure depends on the parametrisation and the loss:
    compare the same network on the same batch only.

    Args:
        closure: recomputes and returns the scalar loss, deterministically (eval mode).
        parameters: what to differentiate by; those that require no gradient are left out.
        iterations: Lanczos steps, each one Hessian-vector product; the figure is a lower bound that grows
            with them. At most as many vectors of the parameters' size are kept.
        seed: seed of the start vector.

    Returns:
        float64 scalar. Gradients that lie in ``.grad`` are not touched, nor is the global RNG.

    Raises:
        ValueError: no parameter requires a gradient, or the loss is no scalar.

    >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> sharpness(lambda: 3 * x[0] ** 2 + x[1] ** 2, [x])
    tensor(6.0000, dtype=torch.float64)
    """
    check_count("iterations", iterations)
    kept = _trainable(parameters)
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = closure()
        if loss.numel() != 1:
            raise ValueError(f"Expected `closure` to return a scalar but got shape {tuple(loss.shape)}.")
        found = torch.autograd.grad(loss, kept, create_graph=True, allow_unused=True)
        pairs = [(p, g) for p, g in zip(kept, found, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros((), dtype=torch.float64, device=kept[0].device)
        return _lanczos([p for p, _ in pairs], [g for _, g in pairs], iterations, seed)


def _lanczos(parameters: list[Tensor], gradient: list[Tensor], iterations: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(p.shape, generator=generator, device="cpu").to(p) for p in parameters]
    norm = _dot(vector, vector).sqrt()
    basis: list[list[Tensor]] = []
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for _ in range(min(iterations, sum(p.numel() for p in parameters))):
        vector = [(v / norm).to(v.dtype) for v in vector]
        basis.append(vector)
        product = torch.autograd.grad(
            gradient, parameters, grad_outputs=vector, retain_graph=True, materialize_grads=True
        )
        vector = [h.detach() for h in product]
        diagonal.append(_dot(vector, basis[-1]))
        for _twice in range(2):
            for direction in basis:
                overlap = _dot(vector, direction)
                vector = [(v - overlap * d).to(v.dtype) for v, d in zip(vector, direction, strict=True)]
        norm = _dot(vector, vector).sqrt()
        if norm <= 1e-6 * torch.stack(diagonal).abs().max():
            break
        off.append(norm)
    beta = torch.stack(off[: len(diagonal) - 1]) if len(diagonal) > 1 else torch.zeros(0).to(diagonal[0])
    tridiagonal = torch.diag(torch.stack(diagonal)) + torch.diag(beta, 1) + torch.diag(beta, -1)
    largest: Tensor = torch.linalg.eigvalsh(tridiagonal)[-1]
    return largest


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    products = [(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(products).sum()


def sam_gap(closure: Callable[[], Tensor], parameters: Sequence[Tensor], rho: float = 0.05) -> Tensor:
    r"""Loss at the worst nearby point minus the loss, ``L(θ + ρ g / ‖g‖) - L(θ)`` with ``g = ∇L(θ)``.

    It is the sharpness that SAM penalises: Foret et al. 2021 (arXiv 2010.01412, equation 1, to first order).
    Parameters are moved in place and put back bit for bit, even if the closure raises.

    Args:
        closure: recomputes and returns the scalar loss, deterministically (eval mode).
        parameters: what to move; those that require no gradient are left out.
        rho: length of the step, over all parameters together.

    Returns:
        float64 scalar; 0 if the gradient is zero. ``.grad`` is not touched.

    Raises:
        ValueError: no parameter requires a gradient, or ρ is not positive.

    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> round(sam_gap(lambda: x.square().sum(), [x], rho=0.5).item(), 4)
    1.25
    """
    check_positive("rho", rho)
    kept = _trainable(parameters)
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
